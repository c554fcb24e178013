"""Read CSV and TSV files, and Flickr8k's `name.jpg#0<TAB>caption` files."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from clipgraft.data.args import TableArgs
from clipgraft.data.flickr import part_of_flickr
from clipgraft.data.parts import PART, Parts
from clipgraft.data.table import (
    CAPTION,
    BadRow,
    Cells,
    Columns,
    Header,
    Rows,
    Table,
    Wanted,
    choose_columns,
    make_row,
)
from clipgraft.data.text_files import text_lines
from clipgraft.errors import ConfigError, DataError
from clipgraft.pictures import IMAGE_SUFFIXES

SEPARATOR = "\t"  # open_clip's default, for .csv files too
USUAL_SEPARATORS = (SEPARATOR, ",", ";", "|")

_LISTS = 5  # rows that are looked at to see whether cells hold lists
_LONGEST_LIST = 100_000
_NO_LIST = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)
_BREAKS = "hold line breaks; if quotes are no quoting here, add `csv_quoting='none'`"
_EXCEL = re.compile(r'"?sep=([^"\r\n])"?\r?\n?', re.IGNORECASE)
_TOKEN_LINE = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)", re.DOTALL)


class _Form(NamedTuple):
    """How a file is split into rows, and which of their cells are wanted.

    Attributes:
        separator: of cells.
        width: cells of the header.
        columns: places of the wanted cells.
        skip: records before the first row.
        quoted: whether double quotes quote.
        encoding: the one that the user gave.
        cells: what they may hold.
        part, split: the place of the cell that tells a row's part, and the parts that are named.
        lists: whether cells of texts hold lists.
    """

    separator: str
    width: int
    columns: Columns
    skip: int
    quoted: bool
    encoding: str | None
    cells: Cells
    part: int = -1
    split: str = ""
    lists: bool = False


def open_delimited(path: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open a CSV or TSV file, or a Flickr8k.token.txt. Row numbers are line numbers, the header being line 1.

    Quoting follows RFC 4180 strictly: a row with broken quoting is one bad row, and reading goes on with the
    next line. A lenient reader would take everything up to the next quote for one caption. A file whose
    quotes are no quoting (`_is_unquoted`) is read as it is.
    """
    first, excel = _first_line(path, args.csv_encoding)
    named = (args.csv_separator, args.csv_img_key, args.csv_caption_key) != (None, None, None)
    if wanted.text is CAPTION and not named and not excel and _TOKEN_LINE.fullmatch(first):
        images = None if args.split is None else part_of_flickr(path, args.split)
        rows = partial(_token_rows, path, args.csv_encoding, wanted.cells(args), images)
        return Table(path, path.parent, "Flickr token file", "line", rows)
    headers = _headers(path, args, first, excel)
    header, columns = choose_columns(path, headers, args, wanted)
    skip, cells = bool(excel) + columns.is_header, wanted.cells(args)
    form = _Form(header.separator, len(header.names), columns, skip, True, args.csv_encoding, cells)
    notes = columns.notes
    if excel:
        notes = ("its first line sep= is Excel's, and no header", *notes)
    if args.csv_quoting == "none":
        form = form._replace(quoted=False)
    elif args.csv_quoting == "auto" and _is_unquoted(path, form):
        form = form._replace(quoted=False)
        notes = (*notes, "it was written without quoting, and is read so (`csv_quoting='none'`)")
    if args.split is not None:
        if PART not in header.names:
            raise DataError(f"{path}: `split` given, but it has no column {PART!r}; leave it out")
        form = form._replace(part=header.names.index(PART), split=args.split)
    if columns.has_texts and not cells.labels and _holds_lists(path, form):
        form = form._replace(lists=True)
        notes = (*notes, "cells of captions hold lists, each of whose texts is a caption")
    kind = f"csv, separator {_name(header.separator)}"
    return Table(
        path,
        path.parent,
        kind,
        "line",
        partial(_rows, path, form),
        notes,
        columns.has_texts,
        has_images=columns.has_images,
    )


def is_token_file(path: Path, encoding: str | None = None) -> bool:
    """Tell whether the first line has the form of Flickr8k.token.txt."""
    return _TOKEN_LINE.fullmatch(_first_line(path, encoding)[0]) is not None


def _headers(path: Path, args: TableArgs, first: str, excel: str) -> list[Header]:
    """Split the first line by the given separator, or by each usual one."""
    if args.csv_separator is not None:
        separators: tuple[str, ...] = (_one_character(args.csv_separator),)
    else:
        separators = (excel,) if excel else USUAL_SEPARATORS
    return [
        Header(
            _names(path, first, separator),
            separator,
            "" if separator in (separators[0], excel) else f'`csv_separator` "{separator}"',
            first,
        )
        for separator in separators
    ]


def _token_rows(path: Path, encoding: str | None, cells: Cells, images: frozenset[str] | None) -> Rows:
    with closing(text_lines(path, encoding)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = _TOKEN_LINE.fullmatch(line)
            if match is None:
                yield BadRow(number, "", "is not of the form name.jpg#0<TAB>caption")
            elif images is None or match[1] in images or PurePath(match[1]).stem in images:
                yield make_row(number, match[1], match[2], cells)


def _rows(path: Path, form: _Form) -> Rows:
    image, texts, width, cells = form.columns.image, form.columns.texts, form.width, form.cells
    last = max(image, *texts)
    parts = Parts(path, form.split) if form.split else None
    with closing(text_lines(path, form.encoding)) as lines:
        records = _records(lines, form.separator, form.quoted)
        for number, record, count in islice(records, form.skip, None):
            if isinstance(record, str):
                yield BadRow(number, "", record)
                continue
            remark = _BREAKS if count > 1 else ""
            if len(record) > width and any(cell.strip() for cell in record[width:]):
                # A tab is in no caption, so that more cells are more columns. Any other separator may be.
                if form.separator == SEPARATOR:
                    remark = "have more cells than the header: those were not read"
                elif last == width - 1 == texts[-1] and not cells.labels:
                    remark = "have more cells than the header: those are the end of the caption"
                    record[last:] = [form.separator.join(record[last:])]
                else:
                    yield _uneven(number, len(record), form, "has more cells than the header")
                    continue
            if parts and len(record) > form.part and not parts.take(record[form.part]):
                continue
            if len(record) <= last:
                yield _uneven(number, len(record), form, "lacks cells")
                continue
            if len(record) < width:
                remark = remark or "have fewer cells than the header, but those that are needed"
            found: list[Any] = [record[place] for place in texts]
            if form.lists:
                found = [text for cell in found for text in (_list_in(cell) or [cell])]
            yield make_row(number, record[image], found, cells, remark)
    if parts:
        parts.check()


def _holds_lists(path: Path, form: _Form) -> bool:
    """Tell whether the first cells of texts are lists, as JSON or Python writes them."""
    with closing(text_lines(path, form.encoding)) as lines:
        records = _records(lines, form.separator, form.quoted)
        head = [record for _, record, _ in islice(records, form.skip, form.skip + _LISTS)]
    last = max(form.columns.texts)
    cells = [r[place] for r in head if len(r) > last and isinstance(r, list) for place in form.columns.texts]
    return bool(cells) and all(_list_in(cell) for cell in cells)


def _list_in(cell: str) -> list[str] | None:
    """The texts of a list in a cell: `["a", "b"]`, or `['a', 'b']` as pandas writes it; None for others."""
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > _LONGEST_LIST:
        return None
    for read in (json.loads, ast.literal_eval):
        with warnings.catch_warnings(), contextlib.suppress(*_NO_LIST):
            warnings.simplefilter("ignore")  # of backslashes, which Python would write in another way
            found = read(text)
            if isinstance(found, list) and found and all(isinstance(part, str) for part in found):
                return found
    return None


def _uneven(number: int, cells: int, form: _Form, kind: str) -> BadRow:
    told = f"has {cells} cells where the header has {form.width}"
    advice = f"put cells that hold {_name(form.separator)} in double quotes"
    return BadRow(number, "", f"{told}; {advice}", kind)


def _is_unquoted(path: Path, form: _Form) -> bool:
    """Tell whether double quotes in a file are part of the text, though some cell begins with one.

    So it is where RFC 4180 would join or refuse lines, each of which has all cells as it stands, and an image
    name in its place. A quoted caption of several lines has other lines.
    """
    with closing(text_lines(path, form.encoding)) as lines:
        if not any('"' in line for line in lines):
            return False
    with closing(text_lines(path, form.encoding)) as lines:
        reader = csv.reader(lines, delimiter=form.separator, strict=True)
        with contextlib.suppress(csv.Error):
            if sum(1 for _ in reader) == reader.line_num:
                return False
    images = set()
    with closing(text_lines(path, form.encoding)) as lines:
        for line in islice((line for line in lines if line.strip()), form.skip, None):
            cells = line.rstrip("\r\n").split(form.separator)
            if len(cells) != form.width or form.width < 2:
                return False
            name = cells[form.columns.image].strip().strip('"')
            images.add(PurePath(name).suffix.lower() in IMAGE_SUFFIXES)
    return len(images) == 1


def _records(
    lines: Iterator[str], separator: str, quoted: bool
) -> Iterator[tuple[int, list[str] | str, int]]:
    """The records of a file: the line each starts on, and how many it takes; instead of a record, the reason
    why it cannot be read.

    After a record with broken quoting, reading starts again at its second line. The csv module's limit on the
    size of a cell (128 KiB unless the user changed it) bounds how many lines are read twice.
    """
    again: deque[str] = deque()
    record_lines: list[str] = []

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            record_lines.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=separator, strict=True)
    number = 1
    while True:
        line = again.popleft() if again else next(lines, None)
        if line is None:
            return
        if "\0" in line:
            yield number, "holds a NUL byte", 1
        elif not quoted or '"' not in line:
            if line.strip(f"{separator} \t\r\n"):
                yield number, line.rstrip("\r\n").split(separator), 1
        else:
            record_lines.clear()
            again.appendleft(line)
            try:
                record = next(reader)
            except csv.Error as error:
                yield number, _broken(error, record_lines), 1
                again.extendleft(reversed(record_lines[1:]))
                reader = csv.reader(feed(), delimiter=separator, strict=True)
            else:
                if any("\0" in part for part in record_lines):
                    yield number, "holds a NUL byte", len(record_lines)
                elif any(cell.strip() for cell in record):
                    yield number, record, len(record_lines)
                number += len(record_lines) - 1
        number += 1


def _broken(error: csv.Error, lines: list[str]) -> str:
    text = str(error)
    if any("\0" in line for line in lines):
        return "holds a NUL byte"
    if "field limit" in text or "field larger" in text:
        return f"a cell is longer than {csv.field_size_limit():,} characters: a double quote is never closed"
    if "unexpected end" in text:
        return "a double quote is opened and never closed"
    return 'broken quoting: write a quote inside a quoted cell twice ("")'


def _names(path: Path, first: str, separator: str) -> tuple[str, ...]:
    try:
        return tuple(name.strip() for name in next(csv.reader([first], delimiter=separator)))
    except csv.Error as error:
        raise DataError(f"{path}: the header line cannot be read ({error}); rewrite it") from error


def _first_line(path: Path, encoding: str | None) -> tuple[str, str]:
    """Return the first line that is not blank, and the separator named by Excel's `sep=;` before it.

    Raises DataError when there is none.
    """
    excel = ""
    with closing(text_lines(path, encoding)) as lines:
        for line in lines:
            match = None if excel else _EXCEL.fullmatch(line)
            if match:
                excel = match[1]
            elif line.strip():
                return line.rstrip("\r\n"), excel
    raise DataError(f"{path}: the file is empty; it needs a header line and at least one row")


def _one_character(separator: str) -> str:
    # In a shell, "\t" is a backslash and a t; open_clip accepts it.
    character = "\t" if separator == "\\t" else separator
    if len(character) != 1 or character in '"\r\n\0':
        raise ConfigError(f"`csv_separator` must be one character, such as \\t or , or ;: got {separator!r}")
    return character


def _name(separator: str) -> str:
    return "tabs" if separator == "\t" else f"'{separator}'"
