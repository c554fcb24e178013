"""Rows of CSV and TSV files, and of Flickr8k's `name.jpg#0<TAB>caption` files."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from clipgraft.data.columns import Columns, Keys, find_columns, guess_notes, missing_columns
from clipgraft.data.rows import BadRow, Rows, Table, make_row, text_lines
from clipgraft.errors import ConfigError, DataError

SEPARATOR = "\t"  # open_clip's default, for .csv files too
USUAL_SEPARATORS = (SEPARATOR, ",", ";", "|")

_TOKEN_LINE = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)", re.DOTALL)


@dataclass(frozen=True)
class _Header:
    names: tuple[str, ...]
    columns: Columns
    separator: str
    notes: tuple[str, ...]


def read_delimited(path: Path, keys: Keys, separator: str | None = None) -> Table:
    """Open a CSV or TSV file with a header line. Row numbers are line numbers, the header being line 1.

    Quoting follows RFC 4180 strictly: a row with broken quoting is one bad row, and reading goes on with the
    next line. A lenient reader would take everything up to the next quote for one caption.
    """
    separators = USUAL_SEPARATORS if separator is None else (_one_character(separator),)
    first = _first_line(path)
    header = _read_header(path, first, keys, separators)
    kind = f"csv, separator {_name(header.separator)}"
    return Table(path, path.parent, kind, "line", partial(_rows, path, header), header.notes)


def header_readings(path: Path, separator: str | None = None) -> dict[str, tuple[str, ...]]:
    """Separator -> the column names of a header line split by it: the one given, or each usual one."""
    separators = USUAL_SEPARATORS if separator is None else (_one_character(separator),)
    first = _first_line(path)
    return {character: _names(path, first, character) for character in separators}


def read_tokens(path: Path) -> Table:
    """Open a Flickr8k.token.txt: no header, no quoting, `name.jpg#0<TAB>caption` on each line."""
    return Table(path, path.parent, "Flickr token file", "line", partial(_token_rows, path))


def is_token_file(path: Path) -> bool:
    """Whether the first line has the form of Flickr8k.token.txt."""
    return _TOKEN_LINE.fullmatch(_first_line(path)) is not None


def _token_rows(path: Path) -> Rows:
    with closing(text_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = _TOKEN_LINE.fullmatch(line)
            if match is None:
                yield BadRow(number, "", "is not of the form name.jpg#0<TAB>caption")
            else:
                yield make_row(number, match[1], match[2])


def _rows(path: Path, header: _Header) -> Rows:
    image, caption = header.names.index(header.columns.image), header.names.index(header.columns.caption)
    width = len(header.names)
    with closing(text_lines(path)) as lines:
        records = _records(lines, header.separator)
        for number, record in islice(records, 1, None):
            if isinstance(record, str):
                yield BadRow(number, "", record)
            elif len(record) < width or any(cell.strip() for cell in record[width:]):
                cells = f"has {len(record)} cells where the header has {width}"
                yield BadRow(
                    number, "", f"{cells}; put cells that hold {_name(header.separator)} in double quotes"
                )
            else:
                yield make_row(number, record[image], record[caption])


def _records(lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """The records of a file with the line each starts on; instead of a record, the reason why it cannot be
    read.

    After a record with broken quoting, reading starts again at its second line. The csv module's limit on the
    size of a cell (128 KiB unless the user changed it) bounds how many lines are read twice.
    """
    again: deque[str] = deque()
    record_lines: list[str] = []

    def feed() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            record_lines.append(line)
            yield line

    number = 1
    reader = csv.reader(feed(), delimiter=separator, strict=True)
    while True:
        record_lines.clear()
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield number, _broken(error, record_lines)
            again.extendleft(reversed(record_lines[1:]))
            number += 1
            reader = csv.reader(feed(), delimiter=separator, strict=True)
            continue
        if record is None:
            return
        if any("\0" in line for line in record_lines):
            yield number, "holds a NUL byte"
        elif any(cell.strip() for cell in record):
            yield number, record
        number += len(record_lines)


def _broken(error: csv.Error, lines: list[str]) -> str:
    text = str(error)
    if any("\0" in line for line in lines):
        return "holds a NUL byte"
    if "field limit" in text or "field larger" in text:
        return f"a cell is longer than {csv.field_size_limit():,} characters: a double quote is never closed"
    if "unexpected end" in text:
        return "a double quote is opened and never closed"
    return 'broken quoting: write a quote inside a quoted cell twice ("")'


def _read_header(path: Path, first: str, keys: Keys, separators: tuple[str, ...]) -> _Header:
    best: tuple[str, ...] = ()
    for separator in separators:
        names = _names(path, first, separator)
        columns = find_columns(names, keys)
        if columns is not None:
            guess = (f'--csv-separator "{separator}"',) if separator != separators[0] else ()
            return _Header(names, columns, separator, guess_notes(columns.guessed + guess))
        best = max(best, names, key=len)
    raise missing_columns(path, best, keys)


def _names(path: Path, first: str, separator: str) -> tuple[str, ...]:
    try:
        return tuple(name.strip() for name in next(csv.reader([first], delimiter=separator)))
    except csv.Error as error:
        raise DataError(f"{path}: the header line cannot be read ({error}); rewrite it") from error


def _first_line(path: Path) -> str:
    """The first line that is not blank, without its line end. Raises DataError when there is none."""
    with closing(text_lines(path)) as lines:
        for line in lines:
            if line.strip():
                return line.rstrip("\r\n")
    raise DataError(f"{path}: the file is empty; it needs a header line and at least one row")


def _one_character(separator: str) -> str:
    # In a shell, "\t" is a backslash and a t; open_clip accepts it.
    character = "\t" if separator == "\\t" else separator
    if len(character) != 1 or character in '"\r\n\0':
        raise ConfigError(f"--csv-separator must be one character, such as \\t or , or ;: got {separator!r}")
    return character


def _name(separator: str) -> str:
    return "tabs" if separator == "\t" else f"'{separator}'"
