"""Rows of an encoded set as others take them: an id that stays, a vector of fixed length, metadata, a digest.

The id is `uuid5(NAMESPACE_URL, "clipgraft:" + key)` of the path or text, so that anyone can compute it. The
digest tells which rows have changed; rows without one were added by others, and are left alone.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipgraft.ours import MARK, version_mark
from clipgraft.search.folder import EncodedSet
from clipgraft.search.store import Array, metadata_table, need_pyarrow

ID, VECTOR, DIGEST = "id", "vector", "row_digest"
_BATCH_BYTES, _MOST = 32 << 20, 1 << 14


@dataclass(frozen=True)
class Batch:
    """Some rows: a pyarrow RecordBatch, and the ids (n,) S16 and digests (n,) uint64 that are in it."""

    record: Any
    ids: Array
    digests: Array

    def where(self, chosen: Array) -> Batch:
        """Keep the rows of a boolean mask."""
        mask = need_pyarrow().array(chosen)
        return Batch(self.record.filter(mask), self.ids[chosen], self.digests[chosen])


def row_id(key: str) -> uuid.UUID:
    """Return the id of the row of a path or text."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{MARK}:{key}")


def mark_of(encoded: EncodedSet) -> dict[str, Any]:
    """Return what a table of ours says of itself: who made it, and of which vectors."""
    manifest, part = encoded.manifest, encoded.part
    origin = manifest.origin
    return {
        "made_by": MARK,
        "version": version_mark(),
        "kind": origin.kind,
        "base": origin.base,
        "fingerprint": origin.fingerprint,
        "adapter": part.adapter,
        "adapter_digest": part.digest,
        "preprocessing": origin.preprocessing,
        "dtype": origin.dtype,
        "dim": manifest.dim,
        "source": manifest.source,
        "root": manifest.root,
    }


def row_schema(encoded: EncodedSet) -> Any:
    """Return the pyarrow schema of the rows."""
    pa = need_pyarrow()
    manifest = encoded.manifest
    number = pa.float16() if manifest.origin.dtype == "float16" else pa.float32()
    known = metadata_table((), (), manifest.origin.kind, None, "").schema
    vector = pa.list_(pa.field("item", number), manifest.dim)
    return pa.schema(
        [
            pa.field(ID, pa.string(), nullable=False),
            *known.remove_metadata(),
            pa.field(VECTOR, vector, nullable=False),
            pa.field(DIGEST, pa.string()),
        ]
    )


def row_batches(encoded: EncodedSet, schema: Any) -> Iterator[Batch]:
    """Yield all rows, shard by shard, a few thousand at a time."""
    kind = encoded.manifest.origin.kind
    for shard in encoded.shards:
        table, vectors = encoded.metadata(shard).combine_chunks(), encoded.vectors(shard)
        step = min(_MOST, max(1, _BATCH_BYTES // (vectors.itemsize * vectors.shape[1])))
        for first in range(0, shard.rows, step):
            own = table.slice(first, step)
            yield _batch(own, np.ascontiguousarray(vectors[first : first + step]), schema, kind)


def _batch(table: Any, vectors: Array, schema: Any, kind: str) -> Batch:
    pa = need_pyarrow()
    keys = table.column("path" if kind == "images" else "caption").to_pylist()
    ids = [row_id(key) for key in keys]
    digests = _digests(table, vectors)
    flat = pa.array(vectors.reshape(-1))
    columns = [
        pa.array([str(each) for each in ids], pa.string()),
        *(column.combine_chunks() for column in table.columns),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field(VECTOR).type),
        pa.array(digests, pa.string()),
    ]
    plain = [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns]
    record = pa.RecordBatch.from_arrays(plain, schema=schema)
    return Batch(record, packed_ids(ids), packed_digests(digests))


def _digests(table: Any, vectors: Array) -> list[str]:
    """Hash each row: the bytes of its vector, and its metadata."""
    pa = need_pyarrow()
    columns = [
        column.cast(pa.int64()).to_pylist() if name == "mtime" else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    found = []
    for vector, *values in zip(vectors, *columns, strict=True):
        digest = hashlib.blake2b(vector.tobytes(), digest_size=8)
        digest.update(repr(values).encode())
        found.append(digest.hexdigest())
    return found


def packed_ids(ids: Sequence[uuid.UUID]) -> Array:
    """Return ids as (n,) S16, of which numpy finds one among millions; all have 16 bytes, zeros included."""
    return np.frombuffer(b"".join(each.bytes for each in ids), "S16")


def packed_digests(digests: Sequence[str]) -> Array:
    """Return hexadecimal digests as (n,) uint64."""
    return np.array([int(each, 16) for each in digests], np.uint64)


class Known:
    """What a target held before: 25 bytes a row."""

    def __init__(self, stored: Iterator[tuple[Sequence[uuid.UUID], Sequence[str]]]) -> None:
        ids, digests = [np.empty(0, "S16")], [np.empty(0, np.uint64)]
        for some, theirs in stored:
            ids.append(packed_ids(some))
            digests.append(packed_digests(theirs))
        every = np.concatenate(ids)
        order = np.argsort(every, kind="stable")
        self._ids, self._digests = every[order], np.concatenate(digests)[order]
        self._seen = np.zeros(len(order), bool)

    def compare(self, batch: Batch) -> tuple[Array, Array]:
        """Return which rows are new, and which have changed; what is never compared is `gone`."""
        if not len(self._ids):
            return np.ones(len(batch.ids), bool), np.zeros(len(batch.ids), bool)
        place = np.minimum(np.searchsorted(self._ids, batch.ids), len(self._ids) - 1)
        there = self._ids[place] == batch.ids
        self._seen[place[there]] = True
        return ~there, there & (self._digests[place] != batch.digests)

    @property
    def missing(self) -> int:
        """How many rows have not been met."""
        return int((~self._seen).sum())

    def gone(self, rows: int = 1000) -> Iterator[list[str]]:
        """Yield the ids of rows that were not met, some at a time."""
        (places,) = np.nonzero(~self._seen)
        for first in range(0, len(places), rows):
            some = self._ids[places[first : first + rows]]
            yield [str(uuid.UUID(bytes=bytes(each).ljust(16, b"\0"))) for each in some]
