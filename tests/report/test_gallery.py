from __future__ import annotations

import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from clipgraft.errors import DataError
from clipgraft.report.gallery import HIT_COLOUR, draw_gallery, wrap

VIETNAMESE = "aăâeêioôơuưy" + "".join(
    unicodedata.normalize("NFC", vowel + tone)
    for vowel in "aăâeêioôơuưy"
    for tone in "\u0300\u0301\u0303\u0309\u0323"
)
QUERIES = ["một con mèo ở bên trái quả táo", "ngôi nhà", "ba quả dưa hấu"]


@pytest.fixture(scope="module")
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(files("clipgraft.assets") / "fonts" / "DejaVuSans-subset.ttf"), 15)


def pictures(count: int = 5) -> list[list[Image.Image]]:
    return [
        [Image.new("RGB", (30 + 9 * n, 40), (200, 30 * q, 40 * n)) for n in range(count)] for q in range(3)
    ]


def hit_boxes(file: Path) -> list[tuple[int, int, int, int]]:
    """Bounding boxes (left, top, right, bottom) of the frames in the hit colour, in reading order."""
    image = Image.open(file).convert("RGB")
    width, height = image.size
    pixels = image.tobytes()
    inside = {
        (n % width, n // width)
        for n in range(width * height)
        if pixels[3 * n : 3 * n + 3] == bytes(HIT_COLOUR)
    }
    boxes = []
    while inside:
        frontier = [min(inside, key=lambda p: (p[1], p[0]))]
        shape = set(frontier)
        inside -= shape
        while frontier:
            x, y = frontier.pop()
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & inside
            inside -= near
            shape |= near
            frontier.extend(near)
        xs, ys = {x for x, _ in shape}, {y for _, y in shape}
        boxes.append((min(xs), min(ys), max(xs), max(ys)))
    return boxes


def test_only_true_images_have_the_hit_frame(tmp_path: Path) -> None:
    """The picture shows a miss as a hit, or frames the wrong image."""
    columns = [("base", pictures()), ("LoRA r=16", pictures())]
    hits: list[list[int | None]] = [[None, 1, None], [0, 1, 4]]
    file = draw_gallery(tmp_path / "g.png", QUERIES, columns, hits, title="Vietnamese", thumbnail=40)
    boxes = hit_boxes(file)
    assert len(boxes) == 4
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(47, 47)}
    first, base_second, lora_second, last = boxes
    assert first[0] < lora_second[0] < last[0]
    assert base_second[1] == lora_second[1]
    assert base_second[0] < first[0]
    pitch = lora_second[0] - first[0]
    assert last[0] - first[0] == 4 * pitch
    assert last[1] - lora_second[1] == lora_second[1] - first[1]


def test_no_hit_no_green(tmp_path: Path) -> None:
    """The hit colour is also used for decoration, so a reader cannot tell hits at a glance."""
    file = draw_gallery(tmp_path / "g.png", QUERIES, [("base", pictures())], [[None] * 3])
    with Image.open(file) as image:
        assert image.format == "PNG"
        image.verify()
    assert hit_boxes(file) == []


def test_images_may_be_files_of_any_mode(tmp_path: Path) -> None:
    """Galleries work for RGB images in memory only, not for a user's own files."""
    rows: list[list[Image.Image | Path | str]] = []
    for mode in ("L", "P", "RGBA"):
        file = tmp_path / f"{mode}.png"
        Image.new(mode, (20, 50)).save(file)
        rows.append([file, str(file), Image.new(mode, (50, 20))])
    draw_gallery(tmp_path / "new" / "g.png", QUERIES, [("base", rows)], [[None, 0, 2]])
    assert (tmp_path / "new" / "g.png").is_file()


def test_failure_leaves_the_old_picture(tmp_path: Path) -> None:
    """An unreadable image half-way destroys the picture of the last run or leaves litter beside it."""
    file = draw_gallery(tmp_path / "g.png", QUERIES, [("base", pictures())], [[None] * 3])
    before = file.read_bytes()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be drawn"):
        draw_gallery(file, QUERIES, [("base", [[broken]] * 3)], [[None] * 3])
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.jpg", "g.png"]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves a truncated PNG under the final name."""

    def full_disk(self: Image.Image, fp: Path, **_: object) -> None:
        Path(fp).write_bytes(b"\x89PNG")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw_gallery(tmp_path / "g.png", QUERIES, [("base", pictures())], [[None] * 3])
    assert list(tmp_path.iterdir()) == []


def test_font_has_every_vietnamese_letter(font: ImageFont.FreeTypeFont) -> None:
    """Vietnamese captions are drawn with empty boxes."""
    missing = bytes(font.getmask("\U0010fffd"))
    letters = VIETNAMESE + VIETNAMESE.upper() + "đĐ"
    assert len(set(letters)) == 2 * 72 + 2
    drawn = {letter: bytes(font.getmask(letter)) for letter in letters}
    assert [letter for letter, mask in drawn.items() if mask == missing] == []
    assert len(set(drawn.values())) == len(letters)


def test_decomposed_letters_are_drawn_like_composed_ones(
    tmp_path: Path, font: ImageFont.FreeTypeFont
) -> None:
    """Captions from macOS file names (loose marks) show their marks beside the letters."""
    written = []
    for form in ("NFC", "NFD"):
        queries = [unicodedata.normalize(form, query) for query in QUERIES]
        name = unicodedata.normalize(form, "tiếng Việt")
        file = draw_gallery(tmp_path / form, queries, [(name, pictures())], [[None] * 3])
        written.append(file.read_bytes())
    assert written[0] == written[1]
    # Pillow with Raqm composes letters itself; without it only composed text is drawn right.
    assert wrap(unicodedata.normalize("NFD", QUERIES[0]), font, 400, 1) == [QUERIES[0]]


def test_captions_stay_in_their_column(font: ImageFont.FreeTypeFont) -> None:
    """Long captions run over the images, or lose words without a sign."""
    text = "hai chiếc ô tô màu đỏ và một cây dừa trên nền xanh dương " + "x" * 90
    lines = wrap(text, font, 200, 99)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 200 for line in lines)
    short = wrap(text, font, 200, 2)
    assert short[0] == lines[0]
    assert len(short) == 2
    assert short[1].endswith("…")
    assert font.getlength(short[1]) <= 200


@pytest.mark.parametrize(
    ("queries", "columns", "hits", "message"),
    [
        ([], [("base", [])], [[]], "at least one query"),
        (QUERIES, [], [], "at least one query"),
        (QUERIES, [("base", pictures())], [], "0 entries for 1 columns"),
        (QUERIES, [("base", pictures())], [[None]], "'base' has 3 rows of images and 1 hits for 3 queries"),
        (QUERIES, [("base", pictures())], [[None, 5, None]], "hit 5 of column 'base', query 1"),
    ],
)
def test_counts_that_do_not_fit(
    tmp_path: Path,
    queries: list[str],
    columns: list[tuple[str, list[list[Image.Image]]]],
    hits: list[list[int | None]],
    message: str,
) -> None:
    """A picture with rows of another query's images is drawn without a word."""
    with pytest.raises(DataError, match=message):
        draw_gallery(tmp_path / "g.png", queries, columns, hits)


def test_unreadable_font_is_named(tmp_path: Path) -> None:
    """A mistyped font path ends in a traceback."""
    with pytest.raises(DataError, match=r"font .*nowhere\.ttf"):
        draw_gallery(
            tmp_path / "g.png", QUERIES, [("base", pictures())], [[None] * 3], font=tmp_path / "nowhere.ttf"
        )
