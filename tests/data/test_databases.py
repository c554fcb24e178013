"""Rows out of SQLite and DuckDB files, by a query that can do nothing else."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clipgraft.data.args import TableArgs
from clipgraft.data.doors import open_table
from clipgraft.data.table import BadRow, Row
from clipgraft.errors import ClipgraftError, ConfigError, DataError

QUERY = "SELECT path, group_concat(caption, '; ') AS caption FROM photos GROUP BY path ORDER BY path"
MAKE = (
    "CREATE TABLE photos (path VARCHAR, caption VARCHAR)",
    "INSERT INTO photos VALUES ('a.jpg', 'một'), ('b.jpg', NULL)",
)
MORE = ("CREATE TABLE other (x INTEGER)",)


def made(path: Path, statements: tuple[str, ...] = MAKE) -> Path:
    """A database after some statements."""
    connect: Any = sqlite3.connect
    if path.suffix == ".duckdb":
        import duckdb

        connect = duckdb.connect
    with closing(connect(str(path))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


def read(path: Path, **options: Any) -> list[tuple[int, str, tuple[str, ...]]]:
    """(number, image, captions) of every row that is not bad."""
    table = open_table(path, TableArgs(**options))
    return [(row.number, row.image, row.texts) for row in table.rows() if isinstance(row, Row)]


@pytest.mark.parametrize("name", ["t.sqlite", "t.db", "t.duckdb"])
def test_rows_of_a_query(tmp_path: Path, name: str) -> None:
    """Captions in a database would have to be exported first, and again after each change."""
    path = made(tmp_path / name)
    assert read(path) == [(1, "a.jpg", ("một",)), (2, "b.jpg", ("",))], "the only table"
    made(path, MORE)
    assert read(path, query=QUERY) == [(1, "a.jpg", ("một",)), (2, "b.jpg", ("",))]
    assert read(
        path, query="SELECT caption AS x, path AS y FROM photos", csv_img_key="y", csv_caption_key="x"
    )
    with pytest.raises(
        ConfigError, match=r"`query` is missing, such as .*; its tables are: (photos, other|other, photos)"
    ):
        read(path)
    with pytest.raises(DataError, match='`csv_img_key`: no column "filepath"; it has "caption"'):
        read(path, query="SELECT caption FROM photos")


@pytest.mark.parametrize("name", ["t.sqlite", "t.duckdb"])
@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE photos",
        "INSERT INTO photos VALUES ('x', 'y') RETURNING path, caption",
        "SELECT path, caption FROM photos; DROP TABLE photos",
        "ATTACH 'OUT' AS x",
        "COPY photos TO 'OUT'",
        "SELECT path, caption FROM read_csv('IN')",
        "SELECT path, caption FROM 'IN'",
        "PRAGMA writable_schema=1",
        "SELECT load_extension('OUT')",
        "VACUUM INTO 'OUT'",
        "SELECT nothing FROM nowhere",
        "",
    ],
)
def test_a_query_can_do_nothing_else(tmp_path: Path, name: str, query: str) -> None:
    """A query out of a stranger's settings would change the database, or read and write other files."""
    path, out, other = made(tmp_path / name), tmp_path / "out", tmp_path / "in.csv"
    other.write_text("path,caption\nx.jpg,secret\n")
    before = path.read_bytes()
    with pytest.raises(ClipgraftError) as error:
        read(path, query=query.replace("OUT", str(out)).replace("IN", str(other)))
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert not out.exists()


def test_what_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged or foreign file, or a lacking package, would end in a traceback."""
    (tmp_path / "t.db").write_bytes(b"not a database at all")
    with pytest.raises(DataError, match="is no SQLite or DuckDB file"):
        read(tmp_path / "t.db")
    for name in ("d.sqlite", "d.duckdb"):
        content = made(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:40] + b"\xff" * (len(content) - 40))
        with pytest.raises(ClipgraftError) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    path = made(tmp_path / "u.sqlite", ("CREATE TABLE t (image, caption)",))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO t VALUES ('a.jpg', CAST(x'ff41' AS TEXT)), ('b.jpg', 'x'), (x'00', 'y')"
        )
        connection.commit()
    found = list(open_table(path).rows())
    assert [row.number for row in found if isinstance(row, Row)] == [2]
    reasons = [row.reason for row in found if isinstance(row, BadRow)]
    assert reasons == ["holds half a character (a lone surrogate)", "the image is a bytes, not a path"]
    made(tmp_path / "m.duckdb")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(DataError, match=r"pip install 'clipgraft\[duckdb\]'"):
        read(tmp_path / "m.duckdb")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    with pytest.raises(ConfigError, match=r"`query` given, but .* is no SQLite or DuckDB file; leave it out"):
        read(tmp_path / "t.csv", query="SELECT 1")
