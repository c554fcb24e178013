"""Read rows of an SQLite or DuckDB file by one SELECT, which changes nothing and reaches no other file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from clipgraft.data.args import TableArgs
from clipgraft.data.json_tables import flat
from clipgraft.data.table import Cells, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import reading, reason

SUFFIXES = (".db", ".db3", ".sqlite", ".sqlite3", ".duckdb", ".ddb")
_SQLITE, _DUCKDB = b"SQLite format 3\0", b"DUCK"
_AT_ONCE = 1024  # rows that are fetched together
_SHOWN = 12
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_LOCKED = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "lock_configuration": "true",
}


class _Result(NamedTuple):
    """What a SELECT gives: names of columns, and what fetches the next rows, none at the end."""

    names: tuple[str, ...]
    fetch: Callable[[], Sequence[tuple[Any, ...]]]


_Run = Callable[[str], AbstractContextManager[_Result]]


def open_database(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open what `query` selects from an SQLite or DuckDB file, or its only table.

    The file is opened for reading alone. A statement that is no single SELECT is refused, and DuckDB's access
    to other files and addresses is off.

    Raises:
        DataError: the file is no database, is damaged, or lacks a column.
        ConfigError: there is no `query` where there are several tables, or it cannot be run.
    """
    kind, run, tables = _kind(source)
    query = args.query or _only_table(source, tables)
    with _asking(source, args.query), run(query) as result:
        names = result.names
    _, columns = choose_columns(source, [Header(names)], args, wanted)
    places = (columns.image, *columns.texts)
    return Table(
        source,
        source.parent,
        f"{kind}, {'query' if args.query else query}",
        "row",
        partial(_rows, source, run, query, places, wanted.cells(args)),
        columns.notes,
        columns.has_texts,
        has_images=columns.has_images,
    )


def _kind(source: Path) -> tuple[str, _Run, Callable[[], list[str]]]:
    """Tell by its first bytes which database a file is: `.db` may be either."""
    with source.open("rb") as file:
        head = file.read(16)
    if head == _SQLITE:
        return "sqlite", partial(_sqlite, source), partial(_sqlite_tables, source)
    if head[8:12] == _DUCKDB:
        return "duckdb", partial(_duckdb, source), partial(_duckdb_tables, source)
    raise DataError(f"{source}: is no SQLite or DuckDB file; name one, or export the table as CSV UTF-8")


def _only_table(source: Path, tables: Callable[[], list[str]]) -> str:
    with reading(source):
        names = tables()
    if len(names) == 1:
        quoted = names[0].replace('"', '""')
        return f'SELECT * FROM "{quoted}"'
    there = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"
    raise ConfigError(
        f"{source}: `query` is missing, such as 'SELECT path, caption FROM photos'; its tables are: {there}"
    )


@contextmanager
def _asking(source: Path, query: str | None) -> Generator[None, None, None]:
    """Blame the query for what goes wrong when it is first run."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        if query is None:
            raise DataError(f"{source}: cannot be read ({reason(error)})") from error
        raise ConfigError(f"{source}: `query` cannot be run: {reason(error)}; correct it") from error


def _rows(source: Path, run: _Run, query: str, places: Sequence[int], cells: Cells) -> Rows:
    number = 0
    with reading(source), run(query) as result:
        while rows := result.fetch():
            for row in rows:
                number += 1
                image, *texts = (row[place] for place in places)
                yield make_row(number, image, flat(texts), cells)


@contextmanager
def _sqlite(source: Path, query: str) -> Generator[_Result, None, None]:
    address = f"file:{quote(str(source.absolute()))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as connection:
        connection.execute("PRAGMA trusted_schema=OFF")  # no view of a stranger calls what has side effects
        # Text that is not UTF-8 is one bad row, not the end of all.
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        connection.set_authorizer(_may)
        cursor = connection.execute(query)
        if cursor.description is None:
            raise ConfigError(f"{source}: `query` selects nothing; write one SELECT")
        yield _Result(tuple(part[0] for part in cursor.description), partial(cursor.fetchmany, _AT_ONCE))


def _may(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def _sqlite_tables(source: Path) -> list[str]:
    listed = (
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND substr(name, 1, 7) != 'sqlite_'"
    )
    with _sqlite(source, listed) as result:
        return [str(name) for (name,) in result.fetch()]


@contextmanager
def _duckdb(source: Path, query: str) -> Generator[_Result, None, None]:
    try:
        import duckdb
    except ImportError as error:
        missing = "reading DuckDB files needs duckdb: pip install 'clipgraft[duckdb]'"
        raise DataError(f"{source}: {missing}") from error
    with closing(duckdb.connect(str(source), read_only=True, config=_LOCKED)) as connection:
        statements = connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError(f"{source}: `query` is not one SELECT; write one, and nothing else")
        found = connection.execute(statements[0])
        names = tuple(part[0] for part in found.description or ())
        yield _Result(names, partial(found.fetchmany, _AT_ONCE))


def _duckdb_tables(source: Path) -> list[str]:
    with _duckdb(source, "SELECT table_name FROM information_schema.tables") as result:
        return [str(name) for (name,) in result.fetch()]
