"""What every kind of table is read into: rows that name an image and its captions, or say why they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clipgraft.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of the table. `image` is the path as written; captions have no surrounding blanks."""

    number: int
    image: str
    captions: tuple[str, ...]


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


def make_row(number: int, image: object, captions: object, *, numbers: bool = False) -> Row | BadRow:
    """Check the two cells of one row. `captions` is a string, None, or a list of strings.

    With `numbers` a number is taken for the text it is written as: class labels often are numbers.
    """
    if image is not None and not isinstance(image, str):
        return BadRow(number, "", f"the image is {_kind(image)}, not a path")
    path = (image or "").strip()
    if not path:
        return BadRow(number, "", "no image path")
    cells = captions if isinstance(captions, list | tuple) else [captions]
    if numbers:
        cells = [_number_as_text(cell) for cell in cells]
    texts = []
    for cell in cells:
        if cell is not None and not isinstance(cell, str):
            return BadRow(number, path, f"the caption is {_kind(cell)}, not text")
        texts.append((cell or "").strip())
    if not all(_is_unicode(text) for text in [path, *texts]):
        return BadRow(number, ascii(path), "holds half a character (a lone surrogate)")
    return Row(number, path, tuple(texts))


_NULLS = frozenset(
    {"nan", "-nan", "none", "null", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "(null)", "\\n", "undefined"}
)


def is_null(text: str) -> bool:
    """Whether a cell holds what a program writes where there is no text, such as pandas' nan.

    "NA" counts in capitals alone: "na" is a fruit in Vietnamese.
    """
    return len(text) <= 9 and (text == "NA" or text.lower() in _NULLS)


def text_encoding(path: Path) -> str:
    """The encoding named by the file's byte order mark; UTF-8, marked or not, where it names none."""
    with path.open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def text_lines(path: Path) -> Generator[str, None, None]:
    """The lines of a text file with their line ends as they are, decoded strictly.

    Raises DataError with the line of the first byte that is not UTF-8.
    """
    encoding = text_encoding(path)
    with path.open(encoding=encoding, newline="") as file:
        try:
            yield from _refuse_binary(path, file)
        except UnicodeDecodeError as error:
            raise _undecodable(path, encoding) from error


def _refuse_binary(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if number == 1 and "\0" in line:
            wrong = "line 1 holds NUL bytes, so this is no UTF-8 text file"
            raise DataError(f"{path}: {wrong}; save the table as UTF-8 (in Excel: CSV UTF-8)")
        yield line


def _undecodable(path: Path, encoding: str) -> DataError:
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"byte 0x{data[error.start]:02x} on line {line} is not valid {error.encoding.upper()}"
        advice = "save the file as UTF-8 (in Excel: CSV UTF-8) or convert it: iconv -f WINDOWS-1258 -t UTF-8"
        return DataError(f"{path}: {wrong}; {advice}")
    return DataError(f"{path}: changed while it was read; run again")


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
