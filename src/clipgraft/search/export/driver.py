"""Copy vectors of an encoded folder to a file, a folder or a database; a second run copies what changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import DataError
from clipgraft.progress import Progress, Told, showing
from clipgraft.results import Result
from clipgraft.search.export.rows import Known, mark_of, row_batches, row_schema
from clipgraft.search.export.sink import Job, VectorSink, need_packages, open_sink
from clipgraft.search.export.target import Target, parse_target
from clipgraft.search.folder import EncodedSet, all_sets
from clipgraft.search.store import need_pyarrow, sole_writer

log = logging.getLogger("clipgraft")


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """Counts of one set of vectors that was copied.

    Attributes:
        target: where to, without a password.
        rows: rows there now that come from the folder: the sum of the next three.
        added, updated, unchanged: of them.
        removed: rows that were there and are no longer in the folder.
        note: what is to be known of the place: its kind of index.
    """

    _shows = ("target", "rows", "added", "updated", "unchanged", "removed")

    target: str
    rows: int
    added: int
    updated: int
    unchanged: int
    removed: int
    note: str


def export_vectors(
    folder: str | Path, to: str, *, overwrite: bool = False, progress: Progress = None
) -> list[ExportResult]:
    """Copy the vectors and metadata of an encoded folder to what other programs read.

    Rows have an `id` (`uuid5(NAMESPACE_URL, "clipgraft:" + path)`, of texts the text), the columns of the
    metadata, a `vector` of fixed length in the type that it is stored in, and a `row_digest`. A second run
    adds, updates and removes what has changed in the folder since. Memory does not grow with the vectors, but
    by 25 bytes for each row that was there.

    Args:
        folder: what `encode_folder` wrote, or a set in it.
        to: `parquet` or `lance` (beside the vectors), `parquet:FILE`, `lance:FOLDER/NAME.lance`,
            `lancedb:FOLDER`, `qdrant:FOLDER`, `qdrant:http://HOST:6333`, `pgvector://USER@HOST/DATABASE`; the
            last four take `?table=NAME`. Passwords come from PGPASSWORD or QDRANT_API_KEY.
        overwrite: replace a table, collection or file of that name that is not ours, or of other vectors.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).

    Returns:
        The counts of each set.

    Raises:
        ConfigError: `to` cannot be read.
        DataError: nothing is encoded there; a package is missing; the place cannot be reached, is not ours,
            or holds other vectors.
    """
    target = parse_target(to)
    need_pyarrow()
    need_packages(target)
    sets = all_sets(folder)
    if not sets[0].manifest.rows:
        raise DataError(f"{folder}: holds no vectors to copy; `clipgraft encode` says why")
    if len(sets) > 1 and target.place:
        names = ", ".join(str(each.place) for each in sets)
        raise DataError(f"{folder}: holds several sets of vectors, and {target} takes one; name it: {names}")
    results = []
    for encoded in sets:
        with sole_writer(encoded.folder), showing(progress, "copying", "row") as told:
            results.append(_copy(encoded, target.beside(encoded.place), overwrite, told))
    return results


def check_target(to: str) -> None:
    """Check what `to` says and that its package is there, before hours of encoding; raises as the above."""
    need_packages(parse_target(to))


@dataclass
class _Counts:
    rows: int = 0
    added: int = 0
    updated: int = 0


def _copy(encoded: EncodedSet, target: Target, overwrite: bool, told: Told | None) -> ExportResult:
    manifest = encoded.manifest
    assert manifest.dim is not None
    schema = row_schema(encoded)
    job = Job(target, schema, manifest.origin.dtype, manifest.dim, mark_of(encoded), overwrite)
    counts = _Counts()
    with open_sink(job) as sink:
        known = Known(sink.stored())
        sink.write(_to_write(encoded, sink, known, counts, told))
        for ids in known.gone():
            sink.remove(ids)
        rows, note = sink.finish()
        if rows != counts.rows:
            raise DataError(
                f"{target}: has {rows:,} rows of {counts.rows:,} after writing; is something else writing to "
                "it? run it again"
            )
    unchanged = counts.rows - counts.added - counts.updated
    return ExportResult(str(target), rows, counts.added, counts.updated, unchanged, known.missing, note)


def _to_write(
    encoded: EncodedSet, sink: VectorSink, known: Known, counts: _Counts, told: Told | None
) -> Iterator[Any]:
    """Yield the rows that a sink needs as RecordBatches, and count all."""
    total = encoded.manifest.rows
    for batch in row_batches(encoded, row_schema(encoded)):
        new, changed = known.compare(batch)
        counts.rows += len(new)
        counts.added += int(new.sum())
        counts.updated += int(changed.sum())
        chosen = new | changed
        if sink.whole or chosen.all():
            yield batch.record
        elif chosen.any():
            yield batch.where(chosen).record
        if told is not None:
            told(counts.rows, total)
