"""A table of LanceDB, in a folder or at an address that LanceDB opens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from clipgraft.errors import DataError
from clipgraft.ours import MARK
from clipgraft.search.export.rows import DIGEST, ID
from clipgraft.search.export.sink import Job
from clipgraft.search.store import need_pyarrow

_OURS = f"{DIGEST} IS NOT NULL"


def need() -> Any:
    """Import lancedb; raises DataError where it is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise DataError("writing for LanceDB needs lancedb: pip install 'clipgraft[lancedb]'") from error
    return lancedb


@contextmanager
def opened(job: Job) -> Iterator[LanceSink]:
    """Open a table for writing; raises DataError where one is there that is not ours, or of other vectors."""
    lancedb = need()
    with job.target.telling("be written"):
        database = lancedb.connect(job.target.place)
        table = _table(database, job.target.table)
        if table is not None and not job.continues((table.schema.metadata or {}).get(MARK.encode())):
            database.drop_table(job.target.table)
            table = None
        yield LanceSink(job, database, table)


def _table(database: Any, name: str) -> Any | None:
    """Open a table; None where there is none."""
    try:
        return database.open_table(name)
    except (ValueError, FileNotFoundError) as error:
        if "not found" in str(error).lower():
            return None
        raise


class LanceSink:
    """A table; each of writing and removing is one version of it, whole or not there."""

    whole = False

    def __init__(self, job: Job, database: Any, table: Any | None) -> None:
        self._job, self._database, self._table = job, database, table

    def stored(self) -> Iterator[tuple[Sequence[UUID], Sequence[str]]]:
        if self._table is None:
            return
        query = self._table.search().where(_OURS).select([ID, DIGEST]).limit(None)
        for batch in query.to_batches(1 << 14):
            ids, digests = (batch.column(name).to_pylist() for name in (ID, DIGEST))
            yield [UUID(each) for each in ids], digests

    def write(self, batches: Iterator[Any]) -> None:
        first = next(batches, None)
        if first is None:
            return
        pa, schema = need_pyarrow(), self._job.schema.with_metadata({MARK: json.dumps(self._job.mark)})
        every = (b.replace_schema_metadata(schema.metadata) for b in itertools.chain([first], batches))
        reader = pa.RecordBatchReader.from_batches(schema, every)
        if self._table is None:
            self._table = self._database.create_table(self._job.target.table, reader)
            return
        upsert = self._table.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
        upsert.execute(reader)

    def remove(self, ids: Sequence[str]) -> None:
        assert self._table is not None
        quoted = ", ".join(f"'{each}'" for each in ids)
        self._table.delete(f"{ID} IN ({quoted})")

    def finish(self) -> tuple[int, str]:
        assert self._table is not None
        return self._table.count_rows(_OURS), "without an index LanceDB compares all vectors, exactly"
