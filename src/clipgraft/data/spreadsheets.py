"""Read one sheet of a spreadsheet: Excel's .xlsx, .xlsm, .xlsb and .xls, and OpenDocument's .ods."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.table import Cells, Columns, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.errors import DataError
from clipgraft.readers import reading

SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
_MOST_BYTES = 4 << 30  # that the parts of a workbook may unpack to: all of a sheet is read into memory
_MOST_CELLS = 30_000_000  # as many Python objects; empty ones count, of which a damaged file may claim many
_ADVICE = "open it in the spreadsheet program, and save it again"

# Numbers of rows, as the program shows them, with their cells.
_Lines = Generator[tuple[int, list[Any]], None, None]


def open_spreadsheet(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open the first visible sheet of a spreadsheet, or the one that `sheet` names.

    The first row that is not empty is the header. A merged cell counts for every row that it covers, as where
    an image stands beside several captions. A number in a cell is the text that it is shown as.

    Raises:
        DataError: python-calamine is not installed, the file is damaged, or lacks the sheet or a column.
    """
    name, note = _choose(source, args.sheet)
    lines = partial(_lines, source, name)
    with closing(lines()) as read:
        first = next(read, None)
    if first is None:
        raise DataError(f"{source}: sheet {name!r} is empty; it needs a header and at least one row")
    names = tuple(_text(cell) or "" for cell in first[1])
    _, columns = choose_columns(source, [Header(names, line=", ".join(names))], args, wanted)
    return Table(
        source,
        source.parent,
        f"spreadsheet, sheet {name!r}",
        "row",
        partial(_rows, lines, first[0] if columns.is_header else 0, columns, wanted.cells(args)),
        (*note, *columns.notes),
        columns.has_texts,
        has_images=columns.has_images,
    )


def _choose(source: Path, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the name of the sheet to read, and what is said of the others."""
    with closing(_workbook(source)) as book:
        visible = [s.name for s in book.sheets_metadata if str(s.visible).endswith(".Visible")]
        names = list(book.sheet_names)
    there = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
    if wanted is None:
        name = next(iter(visible or names), None)
        if name is None:
            raise DataError(f"{source}: has no sheet; {_ADVICE}")
        more = f"read is sheet {name!r} of {len(names)}: {there}; `sheet` names another"
        return name, (more,) if len(names) > 1 else ()
    if wanted in names:
        return wanted, ()
    if wanted.isascii() and wanted.isdecimal() and 1 <= int(wanted[:9]) <= len(names):
        return names[int(wanted) - 1], ()
    raise DataError(f"{source}: `sheet`: no sheet {wanted!r}; there are {there}, numbered from 1")


def _workbook(source: Path) -> Any:
    try:
        import python_calamine
    except ImportError as error:
        missing = "reading spreadsheets needs python-calamine: pip install 'clipgraft[excel]'"
        raise DataError(f"{source}: {missing}; or {_ADVICE} as CSV UTF-8") from error
    _check_size(source)
    return _whole(source, lambda: python_calamine.CalamineWorkbook.from_path(str(source)))


def _check_size(source: Path) -> None:
    """Raise DataError for a workbook that unpacks to more than fits in memory."""
    if not zipfile.is_zipfile(source):  # the old .xls is none
        return
    with reading(source, DataError, _ADVICE), zipfile.ZipFile(source) as parts:
        size = sum(part.file_size for part in parts.infolist())
    if size > _MOST_BYTES:
        raise DataError(f"{source}: unpacks to {size / 1e9:,.1f} GB; save the sheet as CSV UTF-8")


def _whole(source: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives. A panic of calamine, which is written in Rust, is no Exception."""
    try:
        with reading(source, DataError, _ADVICE):
            return read()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{source}: cannot be read (it is damaged); {_ADVICE}") from error


def _lines(source: Path, name: str) -> _Lines:
    """Yield the rows of a sheet that are not empty."""
    with closing(_workbook(source)) as book:
        sheet = _whole(source, lambda: book.get_sheet_by_name(name))
        _check_cells(source, name, (sheet.total_height + 1) * (sheet.total_width + 1))
        rows = _whole(source, lambda: sheet.to_python(skip_empty_area=False))
        merged = _whole(source, lambda: sheet.merged_cell_ranges) or []
    area = sum((bottom - top + 1) * (right - left + 1) for (top, left), (bottom, right) in merged)
    _check_cells(source, name, area)
    for (top, left), (bottom, right) in merged:
        for row in range(top, min(bottom, len(rows) - 1) + 1):
            cells = rows[row]
            for column in range(left, min(right, len(cells) - 1) + 1):
                cells[column] = rows[top][left]
    for number, row in enumerate(rows, 1):
        if any(cell != "" for cell in row):
            yield number, row


def _check_cells(source: Path, name: str, cells: int) -> None:
    if cells > _MOST_CELLS:
        raise DataError(f"{source}: sheet {name!r} has more than {_MOST_CELLS:,} cells; save it as CSV UTF-8")


def _rows(lines: Callable[[], _Lines], header: int, columns: Columns, cells: Cells) -> Rows:
    with closing(lines()) as read:
        for number, row in read:
            if number > header:
                image, *texts = (_text(row[place]) for place in (columns.image, *columns.texts))
                yield make_row(number, image, texts, cells)


def _text(cell: Any) -> str | None:
    """A cell as text: a whole number without its point, a date as 2024-05-31; None for an empty one."""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if cell != "" else None
