"""A table of PostgreSQL with pgvector: `vector` for float32, `halfvec` for float16, and an HNSW index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import numpy as np

from clipgraft.errors import DataError
from clipgraft.search.export.rows import DIGEST, ID, VECTOR
from clipgraft.search.export.sink import Job
from clipgraft.search.store import plain_rows

_TYPES = {"float16": "halfvec", "float32": "vector"}
_LONGEST = {"halfvec": 4000, "vector": 2000}  # dimensions that an HNSW index takes
_COLUMNS = {"bytes": "bigint", "mtime": "timestamptz", "width": "integer", "height": "integer"}
_INCOMING = "clipgraft_incoming"
_HNSW = (
    "SELECT 1 FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam "
    "WHERE indrelid = to_regclass(%s) AND amname = 'hnsw'"
)


def need() -> Any:
    """Import psycopg; raises DataError where it is not installed."""
    try:
        import psycopg
    except ImportError as error:
        raise DataError("writing to PostgreSQL needs psycopg: pip install 'clipgraft[pgvector]'") from error
    return psycopg


@contextmanager
def opened(job: Job) -> Iterator[PostgresSink]:
    """Open a table in one transaction, which is undone as a whole if anything fails.

    Raises:
        DataError: the database cannot be reached or has no pgvector, or the table is not ours.
    """
    psycopg = need()
    with job.target.telling("be written"), psycopg.connect(job.target.place, autocommit=False) as connection:
        _extension(connection, job)
        table = psycopg.sql.Identifier(*job.target.table.split("."))
        there, mark = _found(connection, table)
        if there and not job.continues(mark):
            connection.execute(psycopg.sql.SQL("DROP TABLE {}").format(table))
            there = False
        yield PostgresSink(job, connection, table, there)


def _extension(connection: Any, job: Job) -> None:
    """Make sure that pgvector is there; only who may create extensions can add it."""
    if connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone():
        return
    errors = need().errors
    try:
        connection.execute("CREATE EXTENSION vector")
    except (errors.InsufficientPrivilege, errors.FeatureNotSupported, errors.UndefinedFile) as error:
        raise DataError(
            f"{job.target}: the database has no pgvector; install it, and let a superuser run "
            "CREATE EXTENSION vector there"
        ) from error


def _found(connection: Any, table: Any) -> tuple[bool, str | None]:
    """Whether there is something of this name, and the comment on it."""
    query = "SELECT to_regclass(%s)::oid, obj_description(to_regclass(%s)::oid, 'pg_class')"
    name = table.as_string(connection)
    oid, comment = connection.execute(query, (name, name)).fetchone()
    return oid is not None, comment


class PostgresSink:
    """A table; others see the old rows until all is written."""

    whole = False

    def __init__(self, job: Job, connection: Any, table: Any, there: bool) -> None:
        self._job, self._connection, self._there = job, connection, there
        self._names = {"table": table, "incoming": need().sql.Identifier(_INCOMING)}
        self._type = _TYPES[job.dtype]
        self._columns = [field.name for field in job.schema]
        self._replaced = 0
        if not there:
            self._create()

    def stored(self) -> Iterator[tuple[Sequence[UUID], Sequence[str]]]:
        if not self._there:
            return
        with self._connection.cursor(name="clipgraft_stored") as cursor:  # on the server: some rows at a time
            cursor.execute(self._sql(f"SELECT {ID}, {DIGEST} FROM {{table}} WHERE {DIGEST} IS NOT NULL"))
            while rows := cursor.fetchmany(10_000):
                yield [row[0] for row in rows], [row[1] for row in rows]

    def write(self, batches: Iterator[Any]) -> None:
        if not self._there:
            self._copy("table", batches)
            return
        self._connection.execute(self._sql("CREATE TEMP TABLE {incoming} (LIKE {table}) ON COMMIT DROP"))
        self._copy("incoming", batches)
        names = ", ".join(self._columns)
        updates = ", ".join(f"{name} = EXCLUDED.{name}" for name in self._columns if name != ID)
        self._connection.execute(
            self._sql(
                f"INSERT INTO {{table}} ({names}) SELECT {names} FROM {{incoming}} "
                f"ON CONFLICT ({ID}) DO UPDATE SET {updates}"
            )
        )

    def remove(self, ids: Sequence[str]) -> None:
        self._connection.execute(self._sql(f"DELETE FROM {{table}} WHERE {ID} = ANY(%s::uuid[])"), [ids])

    def finish(self) -> tuple[int, str]:
        note = self._index()
        query = self._sql(f"SELECT count(*) FROM {{table}} WHERE {DIGEST} IS NOT NULL")
        (rows,) = self._connection.execute(query).fetchone()
        if self._replaced:
            note += f"; {self._replaced:,} texts had NUL, which PostgreSQL does not hold: U+FFFD is there"
        return rows, note

    def _sql(self, text: str) -> Any:
        return need().sql.SQL(text).format(**self._names)

    def _create(self) -> None:
        types = {**_COLUMNS, ID: "uuid PRIMARY KEY", VECTOR: f"{self._type}({self._job.dim}) NOT NULL"}
        columns = ", ".join(f"{name} {types.get(name, 'text')}" for name in self._columns)
        self._connection.execute(self._sql(f"CREATE TABLE {{table}} ({columns})"))
        mark = need().sql.Literal(json.dumps(self._job.mark))
        comment = need().sql.SQL("COMMENT ON TABLE {} IS {}").format(self._names["table"], mark)
        self._connection.execute(comment)

    def _index(self) -> str:
        """Make the index unless it is there or not wanted; returns what is to be said of it."""
        how = f"order by vector <#> query ({self._type}, negative inner product)"
        if not self._job.target.indexed:
            return f"no index: exact; {how}"
        if self._job.dim > _LONGEST[self._type]:
            return f"no index, which takes {_LONGEST[self._type]:,} dimensions at most: exact; {how}"
        there = self._connection.execute(
            _HNSW, (self._names["table"].as_string(self._connection),)
        ).fetchone()
        if not there:
            ops = f"{VECTOR} {self._type}_ip_ops"
            self._connection.execute(self._sql(f"CREATE INDEX ON {{table}} USING hnsw ({ops})"))
        return f"HNSW index: approximate; {how}"

    def _copy(self, into: str, batches: Iterator[Any]) -> None:
        """Send rows in the binary form of COPY, in which vectors keep every bit."""
        psycopg = need()
        info = psycopg.types.TypeInfo.fetch(self._connection, self._type)
        with self._connection.cursor() as cursor:
            cursor.adapters.register_dumper(_Packed, _dumper(info.oid))
            names = ", ".join(self._columns)
            with cursor.copy(self._sql(f"COPY {{{into}}} ({names}) FROM STDIN (FORMAT BINARY)")) as copy:
                types = {"bytes": "int8", "mtime": "timestamptz", "width": "int4", "height": "int4"}
                copy.set_types(
                    [
                        info.oid if n == VECTOR else types.get(n, "uuid" if n == ID else "text")
                        for n in self._columns
                    ]
                )
                for batch in batches:
                    for row in self._rows(batch):
                        copy.write_row(row)

    def _rows(self, batch: Any) -> Iterator[list[Any]]:
        import pyarrow as pa

        numbers = batch.column(VECTOR).flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)
        swapped = numbers.astype(numbers.dtype.newbyteorder(">"))
        head = np.array([self._job.dim, 0], ">i2").tobytes()
        table = pa.Table.from_batches([batch.drop_columns([VECTOR])])
        for vector, row in zip(swapped, plain_rows(table, range(batch.num_rows)), strict=True):
            row[VECTOR] = _Packed(head + vector.tobytes())
            row[ID] = UUID(row[ID])
            yield [self._clean(row[name]) for name in self._columns]

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            self._replaced += 1
            return value.replace("\0", "\ufffd")
        return value


class _Packed(bytes):
    """A vector as pgvector sends it: its length, two bytes of nothing, its numbers, the high bytes first."""


def _dumper(number: int) -> Any:
    psycopg = need()
    adapting: Any = psycopg.adapt.Dumper

    class Dumper(adapting):  # type: ignore[misc]
        format = psycopg.pq.Format.BINARY
        oid = number

        def dump(self, obj: _Packed) -> bytes:
            return bytes(obj)

    return Dumper
