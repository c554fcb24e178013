"""Search made-up vectors exactly, as clipgraft does without an index, and with FAISS and USearch indexes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from clipgraft.search.store import widened

Array = npt.NDArray[Any]
_CENTRES, _SPREAD, _K, _BLOCK, _TRAIN, _BATCH = 4096, 0.8, 10, 1 << 16, 200_000, 64
_ENOUGH, _HARDLY, _SECONDS = 0.95, 0.005, 5.0
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
    from clipgraft.search.nearest import nearest

    stored = np.load(Path(folder) / _VECTORS, mmap_mode="r")
    # One shard; what a manifest says of it is not read.
    encoded: Any = SimpleNamespace(shards=[SimpleNamespace(rows=rows)], vectors=lambda shard: stored)
    return {
        "build_seconds": None,
        "build_bytes": None,
        "file_bytes": (Path(folder) / _VECTORS).stat().st_size,
        "effort": "",
        **_measured(folder, lambda asked: nearest(encoded, asked, _K)[1]),
    }


def by_faiss(folder: str, rows: int, dim: int, queries: int, factory: str) -> dict[str, Any]:
    """Build an index of a factory in blocks, write it, read it back, choose its effort and search."""
    import faiss

    stored = np.load(Path(folder) / _VECTORS, mmap_mode="r")
    place = Path(folder) / "index"
    with _most_memory() as most:
        started = time.perf_counter()
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            chosen = np.unique(np.linspace(0, rows - 1, min(rows, _TRAIN)).astype(np.int64))
            index.train(widened(stored[chosen]))
        for first in range(0, rows, _BLOCK):
            index.add(widened(stored[first : first + _BLOCK]))
        faiss.write_index(index, str(place))
        seconds = time.perf_counter() - started
    del index
    index = faiss.read_index(str(place))
    efforts: list[tuple[str, int]] = []
    if factory.startswith("IVF"):
        cells = faiss.extract_index_ivf(index).nlist
        efforts = [("nprobe", 1 << power) for power in range(2, cells.bit_length())]
    elif factory.startswith("HNSW"):
        efforts = [("efSearch", 1 << power) for power in range(4, 11)]
    space = faiss.ParameterSpace()
    return {
        "build_seconds": seconds,
        "build_bytes": most[0],
        **_searched(
            folder,
            place,
            lambda asked: index.search(asked, _K)[1],
            efforts,
            lambda name, value: space.set_index_parameter(index, name, value),
        ),
    }


def by_usearch(folder: str, rows: int, dim: int, queries: int, dtype: str) -> dict[str, Any]:
    """Build USearch's graph of neighbours, write it, map it, choose its effort and search."""
    from usearch.index import Index

    stored = np.load(Path(folder) / _VECTORS, mmap_mode="r")
    place, threads = Path(folder) / "index", int(os.environ["OMP_NUM_THREADS"])
    with _most_memory() as most:
        started = time.perf_counter()
        index = Index(ndim=dim, metric="ip", dtype=dtype)
        for first in range(0, rows, _BLOCK):
            block = widened(stored[first : first + _BLOCK])
            index.add(np.arange(first, first + len(block)), block, threads=threads)
        index.save(str(place))
        seconds = time.perf_counter() - started
    del index
    found: Any = Index.restore(str(place), view=True)
    return {
        "build_seconds": seconds,
        "build_bytes": most[0],
        **_searched(
            folder,
            place,
            lambda asked: found.search(asked, _K, threads=threads).keys.reshape(len(asked), -1),
            [("expansion_search", 1 << power) for power in range(4, 11)],
            lambda name, value: setattr(found, name, value),
        ),
    }


def _searched(
    folder: str,
    place: Path,
    search: Callable[[Array], Array],
    efforts: Sequence[tuple[str, int]],
    take: Callable[[str, int], None],
) -> dict[str, Any]:
    """Search with the least effort that finds enough, or after which twice the effort hardly finds more."""
    asked, truth = np.load(Path(folder) / _QUERIES), np.load(Path(folder) / _TRUTH)
    effort, before = "", -1.0
    for name, value in efforts:
        take(name, value)
        found = _recall(search(asked), truth)
        effort = f"{name} {value}"
        if found >= _ENOUGH or found < before + _HARDLY:
            break
        before = found
    size = place.stat().st_size
    measured = _measured(folder, search)
    place.unlink()
    return {"file_bytes": size, "effort": effort, **measured}


def _recall(found: Array, truth: Array) -> float:
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return float(np.mean([len(set(own) & set(near)) / _K for own, near in pairs]))


def _measured(folder: str, search: Callable[[Array], Array]) -> dict[str, Any]:
    """Return recall, queries a second one by one and in batches, and the memory that searching takes."""
    asked, truth = np.load(Path(folder) / _QUERIES), np.load(Path(folder) / _TRUTH)
    search(asked[:1])
    batches = [asked[first : first + _BATCH] for first in range(0, len(asked), _BATCH)]
    memory = _resident()
    return {
        "recall": _recall(np.concatenate([search(batch) for batch in batches]), truth),
        "one_per_second": _per_second(search, [query[None] for query in asked]),
        "batch_per_second": _per_second(search, [b for b in batches if len(b) == _BATCH] or batches),
        "anonymous_bytes": max(memory[0], _resident()[0]),
        "mapped_bytes": max(memory[1], _resident()[1]),
    }


def _per_second(search: Callable[[Array], Array], batches: Sequence[Array]) -> float:
    """Search batches one after another, again from the first or stopping midway, for a few seconds."""
    done, started = 0, time.perf_counter()
    for batch in itertools.cycle(batches):
        search(batch)
        done += len(batch)
        if (spent := time.perf_counter() - started) > _SECONDS:
            break
    return done / spent


def _resident() -> tuple[int, int]:
    """The resident bytes of this process: its own, and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = dict(line.split(":", 1) for line in lines if "Rss" in line)
    own, mapped = (1024 * int(resident[key].split()[0]) for key in ("RssAnon", "RssFile"))
    return own, mapped


@contextlib.contextmanager
def _most_memory() -> Iterator[list[int]]:
    """Gives a list whose one number becomes the most memory, mapped files aside, that was seen within."""
    most, ended = [_resident()[0]], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], _resident()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _nearest(stored: Array, asked: Array) -> Array:
    """Find the rows of the highest inner products, (queries, 10), by all of them."""
    scores = np.empty((len(asked), 0), np.float32)
    rows = np.empty((len(asked), 0), np.int64)
    for first in range(0, len(stored), _BLOCK):
        new = asked @ widened(stored[first : first + _BLOCK]).T
        near = np.argpartition(-new, min(_K, new.shape[1] - 1), axis=1)[:, :_K]
        scores = np.concatenate([scores, np.take_along_axis(new, near, 1)], 1)
        rows = np.concatenate([rows, near + first], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_K]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return rows


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
