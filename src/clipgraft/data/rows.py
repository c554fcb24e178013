"""The rows that every kind of source is read into: an image with its captions or label, or a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One row of a table that can be used.

    Attributes:
        number: counts in the table's `unit`.
        image: the path as written.
        texts: captions, or one label, without surrounding blanks; "" where a cell is empty.
        nulls: how many of the texts were nan or the like, and are empty now.
        remark: what a person may not have meant, though the row can be used.
    """

    number: int
    image: str
    texts: tuple[str, ...]
    nulls: int = 0
    remark: str = ""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
        number: counts in the table's `unit`.
        image: the path as written, "" where it is not known.
        reason: why, in a few words that do not repeat number and path.
        kind: what it is counted as, where the reason differs from row to row.
    """

    number: int
    image: str
    reason: str
    kind: str = ""


Rows = Generator[Row | BadRow, None, None]


@dataclass(frozen=True)
class Table:
    """An opened source whose columns are chosen.

    Attributes:
        source: the file or folder.
        folder: what relative image paths are relative to.
        kind: what it was read as, in a few words.
        unit: what a row number counts ("line", "row", "image").
        rows: reads the source again from its first row, at every call.
        notes: choices made for the user that they should see.
        has_texts: whether rows have texts of their own; without, each text is the image's path.
        labels: names that the source gives to classes, whether or not a row has them.
    """

    source: Path
    folder: Path
    kind: str
    unit: str
    rows: Callable[[], Rows]
    notes: tuple[str, ...] = ()
    has_texts: bool = True
    labels: tuple[str, ...] = ()


_NULLS = frozenset(
    {"nan", "-nan", "none", "null", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "(null)", "\\n", "undefined"}
)
_NAN = frozenset({"nan", "-nan", "<na>", "#n/a", "#na", "n/a"})


def is_null(text: str) -> bool:
    """Tell whether a cell holds what a program writes for a missing text, such as pandas' nan.

    "NA" counts in capitals alone: "na" is a fruit in Vietnamese.
    """
    return len(text) <= 9 and (text == "NA" or text.lower() in _NULLS)


@dataclass(frozen=True)
class Cells:
    """What the cells of texts may hold.

    Attributes:
        labels: they are labels: a number is the text it is written as, and `none` may be a class.
        keep_nulls: nan and None are words like others.
    """

    labels: bool = False
    keep_nulls: bool = False

    def is_null(self, text: str) -> bool:
        """Tell whether a caption or label is what a program writes for a missing one."""
        if self.keep_nulls or not is_null(text):
            return False
        return not self.labels or text.lower() in _NAN


def make_row(number: int, image: object, texts: object, cells_are: Cells, remark: str = "") -> Row | BadRow:
    """Check the cells of one row. `texts` is a string, None, or a list of strings."""
    if image is not None and not isinstance(image, str):
        return BadRow(number, "", f"the image is a {type(image).__name__}, not a path")
    path = (image or "").strip()
    if not path:
        return BadRow(number, "", "no image path")
    cells = texts if isinstance(texts, list | tuple) else (texts,)
    if cells_are.labels:
        cells = [_number_as_text(cell) for cell in cells]
    kept, nulls = [], 0
    for cell in cells:
        if cell != cell:  # NaN
            nulls += 1
            cell = None
        if cell is not None and not isinstance(cell, str):
            what = "label" if cells_are.labels else "caption"
            return BadRow(number, path, f"the {what} is a {type(cell).__name__}, not text")
        text = (cell or "").strip()
        if text and cells_are.is_null(text):
            text, nulls = "", nulls + 1
        kept.append(text)
    if not (_is_unicode(path) and all(map(_is_unicode, kept))):
        return BadRow(number, ascii(path), "holds half a character (a lone surrogate)")
    return Row(number, path, tuple(kept), nulls, remark)


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
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
