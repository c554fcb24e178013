"""A collection of Qdrant: a folder in local mode, or a server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from clipgraft.errors import DataError
from clipgraft.ours import MARK
from clipgraft.search.export.rows import DIGEST, ID, VECTOR
from clipgraft.search.export.sink import Job
from clipgraft.search.store import plain_rows

_POINTS = 500  # in one request
_KEY = "QDRANT_API_KEY"


def need() -> Any:
    """Import qdrant_client; raises DataError where it is not installed."""
    try:
        import qdrant_client
    except ImportError as error:
        raise DataError("writing for Qdrant needs qdrant-client: pip install 'clipgraft[qdrant]'") from error
    return qdrant_client


@contextmanager
def opened(job: Job) -> Iterator[QdrantSink]:
    """Open a collection; raises DataError where one is there that is not ours, or of other vectors."""
    target, name = job.target, job.target.table
    with target.telling("be written"):
        client = _connect(target.place)
        try:
            if client.collection_exists(name) and not job.continues(_mark(client, name)):
                client.delete_collection(name)
            if not client.collection_exists(name):
                _create(client, job)
            yield QdrantSink(client, name)
        finally:
            client.close()


def _connect(place: str) -> Any:
    if "://" in place:
        # The check of versions only warns, where the first request is about to tell what is wrong.
        key = os.environ.get(_KEY) or None
        return need().QdrantClient(url=place, api_key=key, check_compatibility=False)
    return need().QdrantClient(path=place)


def _mark(client: Any, name: str) -> Any:
    return (client.get_collection(name).config.metadata or {}).get(MARK)


def _create(client: Any, job: Job) -> None:
    models, name = need().models, job.target.table
    vectors = models.VectorParams(
        size=job.dim, distance=models.Distance.DOT, datatype=models.Datatype(job.dtype)
    )
    client.create_collection(name, vectors_config=vectors, metadata={MARK: json.dumps(job.mark)})
    if _mark(client, name) is None:
        client.delete_collection(name)
        raise DataError(f"{job.target}: keeps no metadata of collections; Qdrant 1.16 or newer is needed")


class QdrantSink:
    """A collection; a run that was cut off has left some of its points, and the next one goes on."""

    whole = False

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name, self._models = client, name, need().models

    def stored(self) -> Iterator[tuple[Sequence[UUID], Sequence[str]]]:
        offset = None
        while True:
            points, offset = self._client.scroll(
                self._name, limit=10_000, offset=offset, with_payload=[DIGEST], with_vectors=False
            )
            ours = [point for point in points if DIGEST in (point.payload or {})]
            yield [UUID(point.id) for point in ours], [point.payload[DIGEST] for point in ours]
            if offset is None:
                return

    def write(self, batches: Iterator[Any]) -> None:
        for batch in batches:
            for first in range(0, batch.num_rows, _POINTS):
                self._upsert(batch.slice(first, _POINTS))

    def _upsert(self, batch: Any) -> None:
        ids = batch.column(ID).to_pylist()
        vectors = batch.column(VECTOR).flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1)
        import pyarrow as pa

        rows = plain_rows(pa.Table.from_batches([batch.drop_columns([ID, VECTOR])]), range(len(ids)))
        for row in rows:
            if row.get("mtime") is not None:
                row["mtime"] = row["mtime"].isoformat()
        points = self._models.Batch(ids=ids, vectors=vectors.astype("float32").tolist(), payloads=rows)
        self._client.upsert(self._name, points=points, wait=True)

    def remove(self, ids: Sequence[str]) -> None:
        self._client.delete(self._name, points_selector=self._models.PointIdsList(points=list(ids)))

    def finish(self) -> tuple[int, str]:
        empty = self._models.IsEmptyCondition(is_empty=self._models.PayloadField(key=DIGEST))
        ours = self._models.Filter(must_not=[empty])
        found: int = self._client.count(self._name, count_filter=ours, exact=True).count
        return found, "scores are inner products; a server indexes approximately (HNSW), a folder does not"
