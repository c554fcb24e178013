"""Spreadsheets as people keep captions in them."""

from __future__ import annotations

import datetime
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from clipgraft.data.args import TableArgs
from clipgraft.data.doors import open_table
from clipgraft.data.table import BadRow, Row, Table
from clipgraft.errors import ConfigError, DataError

ROWS = [
    ("Ảnh", "n", "caption"),
    ("a.jpg", 1, "một con mèo"),
    ("b.jpg", 2.5, "hai, “ba”\nbốn"),
    ("c.jpg", None, 7),
]


def read(path: Path, **options: Any) -> Table:
    """The table, opened with options given one by one."""
    return open_table(path, TableArgs(csv_img_key="Ảnh", **options))


def rows(table: Table) -> list[tuple[int, str, tuple[str, ...]]]:
    """(number, image, captions) of every row; none may be bad."""
    found = list(table.rows())
    assert not [row for row in found if isinstance(row, BadRow)]
    return [(row.number, row.image, row.texts) for row in found if isinstance(row, Row)]


@pytest.fixture
def xlsx(tmp_path: Path) -> Path:
    """A workbook that openpyxl wrote: a hidden sheet, one with an empty row above, one with merged cells."""
    import openpyxl

    book = openpyxl.Workbook()
    hidden, data, merged = book.active, book.create_sheet("Dữ liệu"), book.create_sheet("gộp")
    hidden.append(["old"])
    hidden.sheet_state = "hidden"
    data.append([])
    for row in ROWS:
        data.append(row)
    for row in (("Ảnh", "caption"), ("a.jpg", "x"), (None, "y"), ("b.jpg", datetime.date(2024, 5, 31))):
        merged.append(row)
    merged.merge_cells("A2:A3")
    book.save(tmp_path / "t.xlsx")
    return tmp_path / "t.xlsx"


def ods(path: Path, table: list[tuple[Any, ...]], attributes: str = "") -> Path:
    """An OpenDocument spreadsheet of text cells, as the standard has it."""
    cell = '<table:table-cell office:value-type="string" {}><text:p>{}</text:p></table:table-cell>'
    lines = ["".join(cell.format(attributes, value) for value in row) for row in table]
    body = "".join(f"<table:table-row>{line}</table:table-row>" for line in lines)
    spaces = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    sheet = f'<office:spreadsheet><table:table table:name="one">{body}</table:table></office:spreadsheet>'
    content = f"<office:document-content{spaces}><office:body>{sheet}</office:body></office:document-content>"
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        parts.writestr("content.xml", f'<?xml version="1.0" encoding="UTF-8"?>{content}')
        parts.writestr("META-INF/manifest.xml", "<manifest/>")
    return path


def test_rows_of_a_sheet(xlsx: Path, tmp_path: Path) -> None:
    """A hidden sheet would be read, numbers refused as captions, or the user sent to the wrong row."""
    table = read(xlsx)
    wanted = [(3, "a.jpg", ("một con mèo",)), (4, "b.jpg", ("hai, “ba”\nbốn",)), (5, "c.jpg", ("7",))]
    assert rows(table) == wanted
    assert table.kind == "spreadsheet, sheet 'Dữ liệu'"
    assert table.notes[0].startswith("read is sheet 'Dữ liệu' of 3: 'Sheet', 'Dữ liệu', 'gộp'; `sheet` names")
    assert rows(read(xlsx, sheet="2")) == rows(read(xlsx, sheet="Dữ liệu")) == wanted
    same = read(ods(tmp_path / "t.ods", [("Ảnh", "caption"), ("a.jpg", "một"), ("b.jpg", "hai")]))
    assert rows(same) == [(2, "a.jpg", ("một",)), (3, "b.jpg", ("hai",))]


def test_a_merged_cell_counts_for_each_of_its_rows(xlsx: Path) -> None:
    """An image beside several captions would keep the first of them alone."""
    found = [(image, texts) for _, image, texts in rows(read(xlsx, sheet="gộp"))]
    assert found == [("a.jpg", ("x",)), ("a.jpg", ("y",)), ("b.jpg", ("2024-05-31",))]


def test_spreadsheets_that_cannot_be_read(
    xlsx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong sheet or a damaged file would end in a traceback, or fill the memory."""
    with pytest.raises(DataError, match=r"`sheet`: no sheet 'Data'; there are 'Sheet', .*, numbered from 1"):
        read(xlsx, sheet="Data")
    with pytest.raises(DataError, match='`csv_caption_key`: no column "none"; it has "Ảnh"'):
        read(xlsx, csv_caption_key="none")
    (tmp_path / "t.csv").write_text("Ảnh,caption\na.jpg,x\n")
    with pytest.raises(ConfigError, match=r"`sheet` given, but .* is no spreadsheet; leave it out"):
        read(tmp_path / "t.csv", sheet="1")
    whole = xlsx.read_bytes()
    for content in (
        b"",
        b"PK\x03\x04",
        whole[:2000],
        whole.replace(b"xl/worksheets/sheet2", b"xl/worksheets/sheet9"),
    ):
        (tmp_path / "d.xlsx").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read") as error:
            read(tmp_path / "d.xlsx")
        assert "\n" not in str(error.value)
    wide = ods(tmp_path / "h.ods", [("Ảnh", "caption")], 'table:number-columns-repeated="2000"')
    monkeypatch.setattr("clipgraft.data.spreadsheets._MOST_CELLS", 3000)
    with pytest.raises(DataError, match="has more than 3,000 cells; save it as CSV UTF-8"):
        read(wide)
    monkeypatch.setattr("clipgraft.data.spreadsheets._MOST_BYTES", 1000)
    with pytest.raises(DataError, match=r"unpacks to .* GB; save the sheet as CSV UTF-8"):
        read(xlsx)
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(DataError, match=r"pip install 'clipgraft\[excel\]'"):
        read(xlsx)
