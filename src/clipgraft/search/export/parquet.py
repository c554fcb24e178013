"""One Parquet file with vectors as fixed-size lists, which DuckDB, LanceDB, Polars and pyarrow read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from clipgraft.errors import DataError
from clipgraft.files import atomic_path
from clipgraft.ours import MARK
from clipgraft.readers import reading
from clipgraft.search.export.rows import DIGEST, ID
from clipgraft.search.export.sink import Job
from clipgraft.search.store import need_pyarrow


def need() -> Any:
    """Import pyarrow; raises DataError where it is not installed."""
    return need_pyarrow()


@contextmanager
def opened(job: Job) -> Iterator[ParquetSink]:
    """Open a file for writing; raises DataError where one is there that is not ours, or of other vectors."""
    path = Path(job.target.place)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it, like {path / 'vectors.parquet'}")
    there = os.path.lexists(path) and job.continues(_mark(path))
    yield ParquetSink(job, path, there)


def _mark(path: Path) -> Any:
    """The mark of a file; None where it is no Parquet file, or not ours."""
    pa = need()
    try:
        return (pa.parquet.read_schema(path).metadata or {}).get(MARK.encode())
    except (OSError, pa.ArrowException):
        return None


class ParquetSink:
    """A file that takes the place of an older one when it is complete."""

    whole = True

    def __init__(self, job: Job, path: Path, there: bool) -> None:
        self._job, self._path, self._there, self._rows = job, path, there, 0

    def stored(self) -> Iterator[tuple[Sequence[UUID], Sequence[str]]]:
        if not self._there:
            return
        advice = "say `overwrite=True` to write it anew"
        with reading(self._path, DataError, advice), need().parquet.ParquetFile(self._path) as file:
            for batch in file.iter_batches(columns=[ID, DIGEST]):
                ids, digests = (batch.column(name).to_pylist() for name in (ID, DIGEST))
                yield [UUID(each) for each in ids], digests

    def write(self, batches: Iterator[Any]) -> None:
        pa = need()
        schema = self._job.schema.with_metadata({MARK: json.dumps(self._job.mark)})
        with atomic_path(self._path) as temporary, pa.parquet.ParquetWriter(temporary, schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                self._rows += batch.num_rows

    def remove(self, ids: Sequence[str]) -> None:
        """They are not in the new file."""

    def finish(self) -> tuple[int, str]:
        return self._rows, f"vectors are fixed-size lists of {self._job.dim} {self._job.dtype}"
