"""What every kind of table is read into: rows that name an image and its captions, or say why they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One row of the table. `image` is the path as written; captions have no surrounding blanks.

    `nulls` of the captions were nan or the like, and are empty now. `remark` is what a person may not have
    meant, though the row can be used.
    """

    number: int
    image: str
    captions: tuple[str, ...]
    nulls: int = 0
    remark: str = ""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, and why, in a few words that do not repeat its number or path.

    `kind` is what it is counted as, where the reason differs from row to row.
    """

    number: int
    image: str
    reason: str
    kind: str = ""


Rows = Generator[Row | BadRow, None, None]


@dataclass(frozen=True)
class Table:
    """An opened table. Every call of `rows` reads the file again from its first row.

    `folder` is what relative image paths are relative to; `unit` is what a row number counts ("line", "row",
    "image"); `notes` are choices made for the user that they should see.
    """

    source: Path
    folder: Path
    kind: str
    unit: str
    rows: Callable[[], Rows]
    notes: tuple[str, ...] = ()


_NULLS = frozenset(
    {"nan", "-nan", "none", "null", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "(null)", "\\n", "undefined"}
)
_NAN = frozenset({"nan", "-nan", "<na>", "#n/a", "#na", "n/a"})


def is_null(text: str) -> bool:
    """Whether a cell holds what a program writes where there is no text, such as pandas' nan.

    "NA" counts in capitals alone: "na" is a fruit in Vietnamese.
    """
    return len(text) <= 9 and (text == "NA" or text.lower() in _NULLS)


@dataclass(frozen=True)
class Cells:
    """What cells may hold. With `numbers`, a number is the text it is written as: class labels often are
    numbers. With `keep_nulls`, nan and None are words like others.
    """

    numbers: bool = False
    keep_nulls: bool = False

    def is_null(self, text: str) -> bool:
        """Whether a caption, or a label, is what a program writes where there is none."""
        if self.keep_nulls or not is_null(text):
            return False
        return not self.numbers or text.lower() in _NAN  # "none" is a class of many data sets


_ANY = Cells()


def make_row(
    number: int, image: object, captions: object, cells_are: Cells = _ANY, *, remark: str = ""
) -> Row | BadRow:
    """Check the cells of one row. `captions` is a string, None, or a list of strings."""
    if image is not None and not isinstance(image, str):
        return BadRow(number, "", f"the image is {_kind(image)}, not a path")
    path = (image or "").strip()
    if not path:
        return BadRow(number, "", "no image path")
    cells = captions if isinstance(captions, list | tuple) else [captions]
    if cells_are.numbers:
        cells = [_number_as_text(cell) for cell in cells]
    texts, nulls = [], 0
    for cell in cells:
        if cell != cell:  # NaN
            nulls += 1
            cell = None
        if cell is not None and not isinstance(cell, str):
            return BadRow(number, path, f"the caption is {_kind(cell)}, not text")
        text = (cell or "").strip()
        if text and cells_are.is_null(text):
            text, nulls = "", nulls + 1
        texts.append(text)
    if not all(_is_unicode(text) for text in [path, *texts]):
        return BadRow(number, ascii(path), "holds half a character (a lone surrogate)")
    return Row(number, path, tuple(texts), nulls, remark)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_as_text(cell: object) -> object:
    # A table with one empty cell turns a column of whole numbers into floats, and the empty one into NaN.
    if isinstance(cell, float) and (math.isnan(cell) or cell.is_integer()):
        return None if math.isnan(cell) else str(int(cell))
    return str(cell) if isinstance(cell, int | float) else cell


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
