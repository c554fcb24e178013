"""One picture of many: the images of a data set side by side, each with its first caption."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipgraft.data.datasets import Pairs
from clipgraft.files import atomic_path
from clipgraft.pictures import open_image

_SIDE, _GAP, _TEXT = 160, 8, 18  # pixels of a picture, between two, and of the line below one
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def draw_contact_sheet(pairs: Pairs, most: int = 60) -> Image.Image:
    """Draw up to `most` images, evenly out of all, in rows, each with as much of its caption as fits."""
    step = max(1, math.ceil(len(pairs) / most))
    shown = range(0, len(pairs), step)
    across = max(1, math.ceil(math.sqrt(len(shown))))
    down = math.ceil(len(shown) / across)
    cell = (_SIDE + _GAP, _SIDE + _TEXT + _GAP)
    sheet = Image.new("RGB", (across * cell[0] + _GAP, down * cell[1] + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), _font()
    for place, index in enumerate(shown):
        left, top = _GAP + place % across * cell[0], _GAP + place // across * cell[1]
        picture = ImageOps.contain(open_image(pairs.images[index], shortest=_SIDE), (_SIDE, _SIDE))
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2))
        caption = " ".join(pairs.captions[index][0].split())
        while caption and draw.textlength(caption, font) > _SIDE:
            caption = caption[: -max(1, len(caption) // 20)]
        draw.text((left, top + _SIDE + 2), caption, _INK, font)
    return sheet


def write_contact_sheet(pairs: Pairs, path: Path, most: int = 60) -> Path:
    """Write `draw_contact_sheet` as a JPEG or PNG, by the suffix."""
    sheet = draw_contact_sheet(pairs, most)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    with atomic_path(path) as temporary:
        sheet.save(temporary, kind, quality=88)
    return path


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    fonts = resources.files("clipgraft.assets") / "fonts"
    for item in fonts.iterdir():
        if item.name.endswith(".ttf"):
            with resources.as_file(item) as file:
                return ImageFont.truetype(str(file), 12)
    return ImageFont.load_default()
