"""Search made-up vectors exactly, as clipgraft does without an index, and with a FAISS index."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_CENTRES, _SPREAD, _K, _BLOCK, _TRAIN = 4096, 0.8, 10, 1 << 16, 200_000
_VECTORS, _QUERIES, _TRUTH = "vectors.npy", "queries.npy", "truth.npy"


def prepare(folder: str, rows: int, dim: int, queries: int) -> dict[str, Any]:
    """Write unit vectors (rows, dim) in fp16 block by block, queries beside some of them, and the truth."""
    random = np.random.default_rng(0)
    centres = _unit(random.standard_normal((_CENTRES, dim), np.float32))
    stored = np.lib.format.open_memmap(Path(folder) / _VECTORS, "w+", np.float16, (rows, dim))
    for first in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - first)
        around = random.standard_normal((size, dim), np.float32) * (_SPREAD / dim**0.5)
        stored[first : first + size] = _unit(centres[random.integers(0, _CENTRES, size)] + around)
    chosen = np.sort(random.choice(rows, queries, replace=False))
    asked = stored[chosen].astype(np.float32)
    asked += random.standard_normal(asked.shape, np.float32) * (_SPREAD / 2 / dim**0.5)
    np.save(Path(folder) / _QUERIES, _unit(asked))
    np.save(Path(folder) / _TRUTH, _nearest(stored, _unit(asked)))
    return {}


def exact(folder: str, rows: int, dim: int, queries: int) -> dict[str, Any]:
    """Run `nearest`, which `clipgraft search` calls where there is no index, on the mapped file."""
    from clipgraft.search.folder import nearest

    stored = np.load(Path(folder) / _VECTORS, mmap_mode="r")
    # One shard; what a manifest says of it is not read.
    encoded: Any = SimpleNamespace(shards=[SimpleNamespace(rows=rows)], vectors=lambda shard: stored)
    return {
        "build_seconds": None,
        "file_bytes": (Path(folder) / _VECTORS).stat().st_size,
        **_measured(folder, lambda asked: nearest(encoded, asked, _K)[1]),
    }


def by_faiss(folder: str, rows: int, dim: int, queries: int, factory: str) -> dict[str, Any]:
    """Build an index of a factory in blocks, write it, read it back and search; at most 5 % of the cells."""
    import faiss

    stored = np.load(Path(folder) / _VECTORS, mmap_mode="r")
    place = Path(folder) / "index"
    started = time.perf_counter()
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        chosen = np.unique(np.linspace(0, rows - 1, min(rows, _TRAIN)).astype(np.int64))
        index.train(stored[chosen].astype(np.float32))
    for first in range(0, rows, _BLOCK):
        index.add(stored[first : first + _BLOCK].astype(np.float32))
    faiss.write_index(index, str(place))
    seconds = time.perf_counter() - started
    del index
    index = faiss.read_index(str(place))
    if factory.startswith("IVF"):
        cells = faiss.extract_index_ivf(index)
        cells.nprobe = max(1, cells.nlist // 20)
    elif factory.startswith("HNSW"):
        faiss.ParameterSpace().set_index_parameter(index, "efSearch", 128)
    size = place.stat().st_size
    place.unlink()
    del stored
    return {
        "build_seconds": seconds,
        "file_bytes": size,
        **_measured(folder, lambda asked: index.search(asked, _K)[1]),
    }


def _measured(folder: str, search: Callable[[Array], Array]) -> dict[str, Any]:
    """Return recall, queries a second one by one and together, and the memory that searching takes."""
    asked, truth = np.load(Path(folder) / _QUERIES), np.load(Path(folder) / _TRUTH)
    search(asked[:1])
    started = time.perf_counter()
    for query in asked:
        search(query[None])
    between = time.perf_counter()
    found = search(asked)
    ended = time.perf_counter()
    shares = [
        len(set(own) & set(near)) / _K for own, near in zip(found.tolist(), truth.tolist(), strict=True)
    ]
    resident = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line
    )
    anonymous, mapped = (1024 * int(resident[key].split()[0]) for key in ("RssAnon", "RssFile"))
    return {
        "recall": float(np.mean(shares)),
        "one_per_second": len(asked) / (between - started),
        "all_per_second": len(asked) / (ended - between),
        "anonymous_bytes": anonymous,
        "mapped_bytes": mapped,
    }


def _nearest(stored: Array, asked: Array) -> Array:
    """Find the rows of the highest inner products, (queries, 10), by all of them."""
    scores = np.empty((len(asked), 0), np.float32)
    rows = np.empty((len(asked), 0), np.int64)
    for first in range(0, len(stored), _BLOCK):
        new = asked @ stored[first : first + _BLOCK].astype(np.float32).T
        near = np.argpartition(-new, min(_K, new.shape[1] - 1), axis=1)[:, :_K]
        scores = np.concatenate([scores, np.take_along_axis(new, near, 1)], 1)
        rows = np.concatenate([rows, near + first], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_K]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return rows


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
