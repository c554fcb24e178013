"""A picture of what retrieval found: queries with their first images, one column a model."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipgraft.errors import DataError
from clipgraft.files import atomic_path

Picture = Image.Image | Path | str
Column = tuple[str, Sequence[Sequence[Picture]]]

HIT_COLOUR = (22, 163, 74)
"""Frame of the true image, used for nothing else in the picture."""

_PAPER = (255, 255, 255)
_INK = (31, 41, 55)
_FAINT_INK = (107, 114, 128)
_RULE = (229, 231, 235)
_CELL = (243, 244, 246)
_MISS_COLOUR = (203, 208, 214)

_MARGIN, _GAP, _COLUMN_GAP, _FRAME = 24, 6, 32, 4
_CAPTION_WIDTH = 260


@dataclass(frozen=True)
class _Fonts:
    title: ImageFont.FreeTypeFont
    head: ImageFont.FreeTypeFont
    body: ImageFont.FreeTypeFont
    small: ImageFont.FreeTypeFont


@dataclass(frozen=True)
class _Layout:
    """Where things go, in pixels."""

    top: int  # of the first row
    row_height: int
    column_left: tuple[int, ...]
    width: int
    height: int


def draw_gallery(
    path: str | Path,
    queries: Sequence[str],
    columns: Sequence[Column],
    hits: Sequence[Sequence[int | None]],
    *,
    title: str = "",
    thumbnail: int = 96,
    font: str | Path | None = None,
) -> Path:
    """Write a PNG with a row a query: its caption, then for every model the images it found, best first.

    Args:
        path: the file to write; appears whole or not at all.
        queries: the captions.
        columns: `(model name, images[query][rank])`; images of any size, open or as paths.
        hits: `hits[column][query]`, the 0-based place of the true image among those images, None where it is
            not there. It gets a green frame, the others a thin grey one.
        title: a line above everything.
        thumbnail: side of an image in the picture, in pixels.
        font: a TTF/OTF file for captions in scripts that the built-in one lacks (it has Latin with every
            Vietnamese letter, Greek and Cyrillic).

    Returns:
        The path written.

    Raises:
        DataError: the counts do not fit together, or an image or the font cannot be read.
    """
    _check(queries, columns, hits)
    fonts = _load_fonts(font)
    layout = _lay_out(columns, len(queries), bool(title), thumbnail)
    canvas = Image.new("RGB", (layout.width, layout.height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_heads(draw, layout, fonts, columns, hits, title)
    for q, caption in enumerate(queries):
        top = layout.top + q * layout.row_height
        draw.line([(_MARGIN, top), (layout.width - _MARGIN, top)], fill=_RULE)
        _draw_caption(draw, caption, top, layout, fonts.body)
        for (_, images), found, left in zip(columns, hits, layout.column_left, strict=True):
            for place, picture in enumerate(images[q]):
                x = left + place * (thumbnail + 2 * _FRAME + _GAP)
                _draw_cell(canvas, draw, picture, (x, top + _GAP), thumbnail, place == found[q])
    return _save(canvas, Path(path))


def _check(queries: Sequence[str], columns: Sequence[Column], hits: Sequence[Sequence[int | None]]) -> None:
    if not queries or not columns:
        raise DataError("nothing to draw: give at least one query and one column.")
    if len(hits) != len(columns):
        raise DataError(f"hits has {len(hits)} entries for {len(columns)} columns: give one list a column.")
    for (name, images), found in zip(columns, hits, strict=True):
        if len(images) != len(queries) or len(found) != len(queries):
            raise DataError(
                f"column {name!r} has {len(images)} rows of images and {len(found)} hits for "
                f"{len(queries)} queries: give one of each a query."
            )
        for q, place in enumerate(found):
            if place is not None and not 0 <= place < len(images[q]):
                raise DataError(
                    f"hit {place} of column {name!r}, query {q}, is outside its {len(images[q])} images: "
                    "use None where the true image is not among them."
                )


def _load_fonts(font: str | Path | None) -> _Fonts:
    if font is None:
        with as_file(files("clipgraft.assets") / "fonts" / "DejaVuSans-subset.ttf") as bundled:
            return _sizes(bundled)
    try:
        return _sizes(Path(font))
    except OSError as error:
        raise DataError(f"font {font}: {error}; give a TrueType or OpenType file.") from error


def _sizes(file: Path) -> _Fonts:
    title, head, body, small = (ImageFont.truetype(file, size) for size in (20, 16, 15, 12))
    return _Fonts(title, head, body, small)


def _lay_out(columns: Sequence[Column], rows: int, titled: bool, thumbnail: int) -> _Layout:
    cell = thumbnail + 2 * _FRAME
    left = _MARGIN + _CAPTION_WIDTH + _COLUMN_GAP
    lefts = []
    for _, images in columns:
        lefts.append(left)
        most = max(1, *(len(row) for row in images))
        left += max(most * (cell + _GAP) - _GAP, 2 * cell) + _COLUMN_GAP
    top = _MARGIN + (40 if titled else 0) + 52
    row_height = cell + 2 * _GAP
    return _Layout(
        top=top,
        row_height=row_height,
        column_left=tuple(lefts),
        width=left - _COLUMN_GAP + _MARGIN,
        height=top + rows * row_height + _MARGIN,
    )


def _draw_heads(
    draw: ImageDraw.ImageDraw,
    layout: _Layout,
    fonts: _Fonts,
    columns: Sequence[Column],
    hits: Sequence[Sequence[int | None]],
    title: str,
) -> None:
    width = layout.width - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN), _fit(title, fonts.title, width), font=fonts.title, fill=_INK)
    top = layout.top - 52
    draw.text((_MARGIN, top), "query", font=fonts.head, fill=_INK)
    ends = [*(left - _COLUMN_GAP for left in layout.column_left[1:]), layout.width - _MARGIN]
    for (name, _), found, left, end in zip(columns, hits, layout.column_left, ends, strict=True):
        hit_count = sum(place is not None for place in found)
        draw.text((left, top), _fit(name, fonts.head, end - left), font=fonts.head, fill=_INK)
        note = f"true image found for {hit_count} of {len(found)}"
        draw.text((left, top + 23), _fit(note, fonts.small, end - left), font=fonts.small, fill=_FAINT_INK)


def _draw_caption(
    draw: ImageDraw.ImageDraw, caption: str, top: int, layout: _Layout, font: ImageFont.FreeTypeFont
) -> None:
    line_height = sum(font.getmetrics()) + 2
    room = (layout.row_height - 2 * _GAP) // line_height
    lines = wrap(caption, font, _CAPTION_WIDTH, max(1, room))
    y = top + (layout.row_height - len(lines) * line_height) // 2
    for line in lines:
        draw.text((_MARGIN, y), line, font=font, fill=_INK)
        y += line_height


def _draw_cell(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Picture,
    corner: tuple[int, int],
    side: int,
    is_hit: bool,
) -> None:
    x, y = corner
    outer = (x, y, x + side + 2 * _FRAME - 1, y + side + 2 * _FRAME - 1)
    inner = (x + _FRAME - 1, y + _FRAME - 1, x + side + _FRAME, y + side + _FRAME)
    if is_hit:
        draw.rectangle(outer, fill=_CELL, outline=HIT_COLOUR, width=_FRAME)
    else:
        draw.rectangle(inner, fill=_CELL, outline=_MISS_COLOUR, width=1)
    image = _thumbnail(picture, side)
    canvas.paste(
        image, (x + _FRAME + (side - image.width) // 2, y + _FRAME + (side - image.height) // 2), image
    )


def _thumbnail(picture: Picture, side: int) -> Image.Image:
    """The whole picture, upright, within `side` x `side`, RGBA."""
    if isinstance(picture, Image.Image):
        return ImageOps.contain(picture.convert("RGBA"), (side, side))
    try:
        with Image.open(picture) as image:
            return ImageOps.contain(ImageOps.exif_transpose(image).convert("RGBA"), (side, side))
    except OSError as error:
        raise DataError(f"image {picture} cannot be drawn: {error}; check the file.") from error


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break `text` into at most `max_lines` lines of `width` pixels; what does not fit ends in an ellipsis.

    Letters and their marks are joined first (NFC): a font has a glyph for `ộ`, but only shaping engines can
    place loose marks on an `o`.
    """
    lines = [""]
    for word in _pieces(text, font, width):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        last = " ".join(lines[max_lines - 1 :])
        lines[max_lines - 1 :] = [_fit(last, font, width)]
    return lines


def _pieces(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """The words of `text`; one that is wider than a line comes in parts."""
    for word in unicodedata.normalize("NFC", text).split():
        part = ""
        for letter in word:
            if part and font.getlength(part + letter) > width:
                yield part
                part = ""
            part += letter
        yield part


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line of `width` pixels, shortened with an ellipsis if it must be."""
    text = unicodedata.normalize("NFC", text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text.rstrip() + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _save(canvas: Image.Image, path: Path) -> Path:
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)
    return path
