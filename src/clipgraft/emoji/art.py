"""The shipped emoji art: what can be drawn, its names, and its sprites at any size.

Sprites live in one atlas an art style, in the order of `objects.json`; `scripts/emoji/build_art.py` writes
both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from clipgraft.errors import DataError

ART = Path(__file__).parents[1] / "assets" / "emoji" / "art"


@dataclass(frozen=True)
class EmojiObject:
    """One drawable thing.

    Attributes:
        code: Unicode code point in hexadecimal, e.g. "1F34E".
        category: English category name, e.g. "fruit".
        names: language -> Unicode CLDR short name.
        english: singular with its article, plural: ("a red apple", "red apples").
        vietnamese: classifier and noun: "quả táo đỏ".
    """

    code: str
    category: str
    names: dict[str, str]
    english: tuple[str, str]
    vietnamese: str


@dataclass(frozen=True)
class Art:
    """Everything `objects.json` says.

    Attributes:
        sprite: side of a stored sprite in pixels.
        columns: sprites in one row of an atlas.
        styles: names of the art styles, each an atlas `<style>.webp`.
        categories: English category name -> language -> name.
        objects: all objects, in atlas order.
    """

    sprite: int
    columns: int
    styles: tuple[str, ...]
    categories: dict[str, dict[str, str]]
    objects: tuple[EmojiObject, ...]


@cache
def load_art() -> Art:
    """Read `objects.json`.

    Raises:
        DataError: the file is missing from the installation.
    """
    path = ART / "objects.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; reinstall clipgraft, or run scripts/emoji/build_art.py")
    table = json.loads(path.read_text(encoding="utf-8"))
    objects = tuple(
        EmojiObject(o["code"], o["category"], o["names"], (o["en"][0], o["en"][1]), o["vi"])
        for o in table["objects"]
    )
    return Art(table["sprite"], table["columns"], tuple(table["styles"]), table["categories"], objects)


@cache
def _atlas(style: int) -> Image.Image:
    path = ART / f"{load_art().styles[style]}.webp"
    if not path.is_file():
        raise DataError(f"{path} is missing; reinstall clipgraft, or run scripts/emoji/build_art.py")
    with Image.open(path) as image:
        return image.convert("RGBA")


# Bounded because every (object, style, size, angle) together would take some 200 MB.
@lru_cache(maxsize=16384)
def sprite(style: int, index: int, size: int, angle: int) -> Image.Image:
    """Object `index` drawn in `style`: an RGBA square of `size` pixels, turned by `angle` degrees.

    The image is shared between callers: paste it, do not draw on it.
    """
    art = load_art()
    x, y = index % art.columns * art.sprite, index // art.columns * art.sprite
    image = _atlas(style).crop((x, y, x + art.sprite, y + art.sprite))
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
    return image.resize((size, size), Image.Resampling.BICUBIC)
