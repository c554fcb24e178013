"""Rows of CSV and TSV files, and of Flickr8k's `name.jpg#0<TAB>caption` files."""

from __future__ import annotations

import contextlib
import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePath

from clipgraft.data.columns import Keys, by_number, find_columns, guess_notes, missing_columns
from clipgraft.data.rows import BadRow, Rows, Table, make_row
from clipgraft.data.table_options import TableOptions
from clipgraft.data.text_files import text_lines
from clipgraft.errors import ConfigError, DataError
from clipgraft.pictures import IMAGE_SUFFIXES

SEPARATOR = "\t"  # open_clip's default, for .csv files too
USUAL_SEPARATORS = (SEPARATOR, ",", ";", "|")

_BREAKS = "hold line breaks; if quotes are no quoting here, add --csv-quoting none"
_EXCEL = re.compile(r'"?sep=([^"\r\n])"?\r?\n?', re.IGNORECASE)
_TOKEN_LINE = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)", re.DOTALL)


@dataclass(frozen=True)
class _Header:
    """How a file is split, which cells of its rows are wanted, and on which record they begin."""

    width: int
    image: int
    captions: tuple[int, ...]
    separator: str
    skip: int  # records before the first row
    notes: tuple[str, ...]


def read_delimited(path: Path, options: TableOptions) -> Table:
    """Open a CSV or TSV file. Row numbers are line numbers, the header being line 1.

    Quoting follows RFC 4180 strictly: a row with broken quoting is one bad row, and reading goes on with the
    next line. A lenient reader would take everything up to the next quote for one caption. A file whose
    quotes are no quoting (`_is_unquoted`) is read as it is.
    """
    header = _read_header(path, options)
    quoted = options.quoting != "none"
    notes = header.notes
    if options.quoting == "auto" and _is_unquoted(path, options.encoding, header):
        quoted = False
        notes = (*notes, "it was written without quoting, and is read so (--csv-quoting none)")
    kind = f"csv, separator {_name(header.separator)}"
    rows = partial(_rows, path, header, options, quoted)
    return Table(path, path.parent, kind, "line", rows, notes)


def header_readings(path: Path, options: TableOptions) -> dict[str, tuple[str, ...]]:
    """Separator -> the column names of a header line split by it: the one given, or each usual one."""
    first, excel, _ = _first_line(path, options.encoding)
    return {character: _names(path, first, character) for character in _separators(options, excel)}


def read_tokens(path: Path, options: TableOptions) -> Table:
    """Open a Flickr8k.token.txt: no header, no quoting, `name.jpg#0<TAB>caption` on each line."""
    return Table(path, path.parent, "Flickr token file", "line", partial(_token_rows, path, options))


def is_token_file(path: Path, encoding: str | None = None) -> bool:
    """Whether the first line has the form of Flickr8k.token.txt."""
    return _TOKEN_LINE.fullmatch(_first_line(path, encoding)[0]) is not None


def _token_rows(path: Path, options: TableOptions) -> Rows:
    with closing(text_lines(path, options.encoding)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = _TOKEN_LINE.fullmatch(line)
            if match is None:
                yield BadRow(number, "", "is not of the form name.jpg#0<TAB>caption")
            else:
                yield make_row(number, match[1], match[2], options.cells)


def _rows(path: Path, header: _Header, options: TableOptions, quoted: bool) -> Rows:
    width, wanted, cells_are = header.width, (header.image, *header.captions), options.cells
    last = max(wanted)
    with closing(text_lines(path, options.encoding)) as lines:
        records = _records(lines, header.separator, quoted)
        for number, record, count in islice(records, header.skip, None):
            if isinstance(record, str):
                yield BadRow(number, "", record)
                continue
            remark = (
                "hold line breaks; if quotes are no quoting here, add --csv-quoting none" if count > 1 else ""
            )
            if len(record) > width and any(cell.strip() for cell in record[width:]):
                # A tab is in no caption, so that more cells are more columns. Any other separator may be.
                if header.separator == SEPARATOR:
                    remark = "have more cells than the header: those were not read"
                elif last == width - 1 == header.captions[-1] and not options.numbers:
                    remark = "have more cells than the header: those are the end of the caption"
                    record[last:] = [header.separator.join(record[last:])]
                else:
                    yield _uneven(number, len(record), header, "has more cells than the header")
                    continue
            if len(record) <= last:
                yield _uneven(number, len(record), header, "lacks cells")
                continue
            if len(record) < width:
                remark = remark or "have fewer cells than the header, but those that are needed"
            captions = [record[place] for place in header.captions]
            yield make_row(
                number,
                record[header.image],
                captions[0] if len(captions) == 1 else captions,
                cells_are,
                remark=remark,
            )


def _uneven(number: int, cells: int, header: _Header, kind: str) -> BadRow:
    told = f"has {cells} cells where the header has {header.width}"
    advice = f"put cells that hold {_name(header.separator)} in double quotes"
    return BadRow(number, "", f"{told}; {advice}", kind)


def _is_unquoted(path: Path, encoding: str | None, header: _Header) -> bool:
    """Whether quotes in a file cannot be meant as quoting, though some cell begins with one.

    So it is where RFC 4180 would join or refuse lines, each of which has all cells as it stands, and an image
    name in its place. A quoted caption of several lines has other lines.
    """
    with closing(text_lines(path, encoding)) as lines:
        if not any('"' in line for line in lines):
            return False
    with closing(text_lines(path, encoding)) as lines:
        reader = csv.reader(lines, delimiter=header.separator, strict=True)
        with contextlib.suppress(csv.Error):
            if sum(1 for _ in reader) == reader.line_num:
                return False
    images = set()
    with closing(text_lines(path, encoding)) as lines:
        for line in islice((line for line in lines if line.strip()), header.skip, None):
            cells = line.rstrip("\r\n").split(header.separator)
            if len(cells) != header.width or header.width < 2:
                return False
            images.add(PurePath(cells[header.image].strip().strip('"')).suffix.lower() in IMAGE_SUFFIXES)
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


def _read_header(path: Path, options: TableOptions) -> _Header:
    first, excel, before = _first_line(path, options.encoding)
    keys = Keys(options.image_key, options.caption_key)
    separators = _separators(options, excel)
    said: tuple[str, ...] = ("its first line sep= is Excel's, and no header",) if excel else ()
    best: tuple[str, ...] = ()
    for separator in separators:
        names = _names(path, first, separator)
        columns = find_columns(names, keys)
        guess = (f'--csv-separator "{separator}"',) if separator not in (separators[0], excel) else ()
        if columns is not None:
            places = [names.index(name) for name in (columns.image, *columns.captions)]
            twice = [name for name in (columns.image, *columns.captions) if names.count(name) > 1]
            said += tuple(
                f'column "{name}" stands there {names.count(name)} times: the first is read' for name in twice
            )
            notes = (*said, *guess_notes(columns.guessed + guess))
            return _Header(len(names), places[0], tuple(places[1:]), separator, before + 1, notes)
        numbered = _without_names(names, keys)
        if numbered is not None:
            image, captions, is_row = numbered
            how = "no header line: " if is_row else f"the first line is taken for a header ({first[:40]}): "
            what = f"images from column {image + 1}, captions from {', '.join(str(c + 1) for c in captions)}"
            notes = (*said, how + what, *guess_notes(guess))
            return _Header(len(names), image, captions, separator, before + (not is_row), notes)
        best = max(best, names, key=len)
    raise missing_columns(path, best, keys)


def _without_names(names: tuple[str, ...], keys: Keys) -> tuple[int, tuple[int, ...], bool] | None:
    """(image column, caption columns, whether the first line is a row) of a file that names no columns.

    Columns are named by numbers, or there are two of which one holds the name of an image.
    """
    images = [i for i, name in enumerate(names) if PurePath(name).suffix.lower() in IMAGE_SUFFIXES]
    if keys == Keys() and len(names) == 2 and len(images) == 1:
        return images[0], (1 - images[0],), True
    columns = by_number(keys, len(names))
    if columns is None:
        return None
    image = int(columns.image) - 1
    is_row = image in images or names[image].isdecimal()
    return image, tuple(int(caption) - 1 for caption in columns.captions), is_row


def _names(path: Path, first: str, separator: str) -> tuple[str, ...]:
    try:
        return tuple(name.strip() for name in next(csv.reader([first], delimiter=separator)))
    except csv.Error as error:
        raise DataError(f"{path}: the header line cannot be read ({error}); rewrite it") from error


def _first_line(path: Path, encoding: str | None) -> tuple[str, str, int]:
    """The first line that is not blank, without its line end; the separator that Excel's `sep=;` names before
    it, and how many records stand before it. Raises DataError when there is none.
    """
    excel = ""
    with closing(text_lines(path, encoding)) as lines:
        for line in lines:
            match = None if excel else _EXCEL.fullmatch(line)
            if match:
                excel = match[1]
            elif line.strip():
                return line.rstrip("\r\n"), excel, int(bool(excel))
    raise DataError(f"{path}: the file is empty; it needs a header line and at least one row")


def _separators(options: TableOptions, excel: str) -> tuple[str, ...]:
    if options.separator is not None:
        return (_one_character(options.separator),)
    return (excel,) if excel else USUAL_SEPARATORS


def _one_character(separator: str) -> str:
    # In a shell, "\t" is a backslash and a t; open_clip accepts it.
    character = "\t" if separator == "\\t" else separator
    if len(character) != 1 or character in '"\r\n\0':
        raise ConfigError(f"--csv-separator must be one character, such as \\t or , or ;: got {separator!r}")
    return character


def _name(separator: str) -> str:
    return "tabs" if separator == "\t" else f"'{separator}'"
