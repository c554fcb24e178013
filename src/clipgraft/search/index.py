"""Build and open a FAISS index over the vectors of an encoded folder, in `index/` beside them.

The default compares with every vector, held in memory as float32. A factory string such as `IVF256,Flat` or
`HNSW32` is faster and finds less: how much less is measured. Vectors go in shard by shard; only those that a
factory is trained on are held at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipgraft.errors import ClipgraftError, ConfigError, DataError
from clipgraft.files import atomic_folder, inside, write_json
from clipgraft.progress import Progress, showing
from clipgraft.readers import reading
from clipgraft.records import Finite, Whole, read_json
from clipgraft.search.folder import EncodedSet, all_sets
from clipgraft.search.manifest import INDEX_FOLDER
from clipgraft.search.nearest import nearest
from clipgraft.search.store import INSTALL, Array, size_and_digest, sole_writer

log = logging.getLogger("clipgraft")
FORMAT = 1
EXACT = "Flat"
RECORD = "index.json"
# FAISS ends the process over these, later.
_CRASHES = re.compile(r"(?<![0-9])0+(?![0-9])|HNSW0*1(?![0-9])|NSG0*[1-7](?![0-9])")
FILES = {"images": "image.index", "texts": "text.index"}
_TRAINING_ROWS = 200_000
_AGAIN = "run `clipgraft index` again"
_PROBES, _K, _ENOUGH = 200, 10, 0.95


@dataclass(frozen=True)
class IndexRecord:
    """The content of `index.json`.

    Attributes:
        factory: FAISS's name of the kind of index.
        rows, dim: of the vectors in it.
        fingerprint: of the base.
        adapter, digest: what changed the vectors, None for the base's own.
        state: digest of the vectors that it was built of.
        recall: share of the 10 nearest that it finds, None for an exact one.
        settings: how hard it searches: `nprobe` or `efSearch`.
        sha256: of FAISS's file, None where an older version wrote it. FAISS is not given a file with other
            bytes: some make it end the process.
    """

    factory: str
    rows: Whole
    dim: Whole
    fingerprint: str
    adapter: str | None
    digest: str | None
    state: str
    recall: Finite | None = None
    settings: dict[str, Whole] | None = None
    sha256: str | None = None


def build_index(
    folder: str | Path, factory: str = EXACT, *, progress: Progress = None
) -> list[tuple[Path, IndexRecord]]:
    """Build an index of every set of vectors of an encoded folder, or of the one set that is named.

    An index that is not exact is made to search harder until it finds 95 % of the 10 nearest rows of 200
    stored vectors, or cannot search harder. A text is farther from all images, so that it may find fewer.

    Args:
        folder: what `encode_folder` wrote.
        factory: of FAISS, such as `IVF256,Flat`, `HNSW32`, `SQfp16`; `Flat` is exact.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).

    Returns:
        The folder of each index, and its record.

    Raises:
        DataError: nothing is encoded there, or FAISS is not installed.
        ConfigError: FAISS knows no such factory, or it needs more vectors.
    """
    faiss = need_faiss()
    built = []
    for encoded in all_sets(folder):
        with sole_writer(encoded.folder):
            built.append(_build(faiss, encoded, factory, progress))
    return built


def need_faiss() -> Any:
    """Import faiss; raises DataError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise DataError(f"an index needs FAISS: {INSTALL}") from error
    return faiss


def open_index(encoded: EncodedSet) -> Any | None:
    """Open the FAISS index of a set of vectors; None where there is none, or one of older vectors.

    Raises:
        DataError: it is damaged, or was made of the vectors of another base or adapter.
    """
    place = _place(encoded)
    record = read_record(place)
    if record is None:
        return None
    origin = encoded.manifest.origin
    if (record.fingerprint, record.digest) != (origin.fingerprint, encoded.part.digest):
        raise DataError(
            f"{place}: is of base {record.fingerprint}, adapter {record.adapter}, and its folder is not; "
            f"{_AGAIN}"
        )
    if record.state != _state(encoded):
        log.warning("%s: is older than the vectors, which are searched directly; %s", place, _AGAIN)
        return None
    faiss, file = need_faiss(), inside(encoded.folder, _inside(encoded, FILES[origin.kind]))
    with reading(file, DataError, _AGAIN):
        if record.sha256 is not None and size_and_digest(file)[1] != record.sha256:
            raise DataError(f"{file}: is damaged: its bytes are not those that {RECORD} lists; {_AGAIN}")
        index = _read(faiss, file)
        held = (index.ntotal, index.d, index.metric_type)
    if held != (encoded.manifest.rows, encoded.manifest.dim, faiss.METRIC_INNER_PRODUCT):
        raise DataError(f"{file}: holds {held[0]} vectors of {held[1]}, not those of its folder; {_AGAIN}")
    return index


def _read(faiss: Any, file: Path) -> Any:
    """Read an index; where FAISS supports it, no part of it may claim to be larger than the file."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        return faiss.read_index(str(file))
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(file.stat().st_size + (1 << 20))
    try:
        return faiss.read_index(str(file))
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def read_record(place: Path) -> IndexRecord | None:
    """Read the record of an index folder, None where there is none; raises DataError if it is damaged."""
    if not os.path.lexists(place / RECORD):
        return None
    return read_json(place / RECORD, _File, advice=_AGAIN)


@dataclass(frozen=True)
class _File(IndexRecord):
    """The record as the file has it."""

    clipgraft_index: Literal[1] = field(kw_only=True)


def _inside(encoded: EncodedSet, name: str = "") -> str:
    """Return the path of a file in a set's index folder, relative to the encoded folder."""
    return f"{encoded.part.folder}/{INDEX_FOLDER}/{name}".strip("/")


def _place(encoded: EncodedSet) -> Path:
    return inside(encoded.folder, _inside(encoded))


def _refuse_foreign(place: Path) -> None:
    """Raise DataError where a folder that is no index of ours would be replaced."""
    if not os.path.lexists(place):
        return
    record = place / RECORD
    strange = not place.is_dir() or {path.name for path in place.iterdir()} - {RECORD, *FILES.values()}
    known = record.read_bytes() if record.is_file() else b""
    if strange or (any(place.iterdir()) and b"clipgraft_index" not in known):
        raise DataError(f"{place}: holds something else than an index of ours; move it away, then {_AGAIN}")


def _build(faiss: Any, encoded: EncodedSet, factory: str, progress: Progress) -> tuple[Path, IndexRecord]:
    origin, dim = encoded.manifest.origin, encoded.manifest.dim
    if dim is None or not encoded.manifest.rows:
        raise DataError(f"{encoded.place}: holds no vectors, so there is nothing to index")
    place = _place(encoded)
    _refuse_foreign(place)
    index = _made(faiss, factory, dim)
    if not index.is_trained:
        _train(index, encoded, factory)
    with _faiss(f"`factory={factory!r}`: cannot hold these vectors", "an index of another kind"):
        with showing(progress, "indexing", "vector") as told:
            for first, block in encoded.blocks():
                index.add(block)
                if told is not None:
                    told(first + len(block), encoded.manifest.rows)
        recall, settings = (None, None) if factory == EXACT else _tuned(faiss, index, encoded)
    part = encoded.part
    with atomic_folder(place) as temporary:
        file = temporary / FILES[origin.kind]
        faiss.write_index(index, str(file))
        record = IndexRecord(
            factory,
            encoded.manifest.rows,
            dim,
            origin.fingerprint,
            part.adapter,
            part.digest,
            _state(encoded),
            recall,
            settings,
            size_and_digest(file)[1],
        )
        write_json(temporary / RECORD, {"clipgraft_index": FORMAT, **asdict(record)})
    return place, record


def _made(faiss: Any, factory: str, dim: int) -> Any:
    if factory == EXACT:
        return faiss.IndexFlatIP(dim)
    if _CRASHES.search(factory):
        raise ConfigError(
            f"`factory={factory!r}`: sizes begin at 1, of HNSW at 2 and of NSG at 8; take larger ones"
        )
    wrong = f"`factory={factory!r}`: FAISS cannot make it of {dim}-dimensional vectors"
    with _faiss(wrong, "one such as IVF256,Flat or HNSW32"):
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)


def _train(index: Any, encoded: EncodedSet, factory: str) -> None:
    """Train an index on rows at even distances."""
    rows = encoded.manifest.rows
    wanted = np.unique(np.linspace(0, rows - 1, min(rows, _TRAINING_ROWS)).astype(np.int64))
    log.info("training %s on %s vectors", factory, f"{len(wanted):,}")
    vectors = _rows(encoded, wanted)
    wrong = f"`factory={factory!r}`: cannot be trained on {len(wanted):,} vectors"
    with _faiss(wrong, "fewer cells, or an exact index without `factory`"):
        index.train(vectors)


def _rows(encoded: EncodedSet, wanted: Array) -> Array:
    """Return some rows, given in ascending order, as float32."""
    parts = [
        block[wanted[(wanted >= first) & (wanted < first + len(block))] - first]
        for first, block in encoded.blocks()
    ]
    return np.concatenate(parts)


def _tuned(faiss: Any, index: Any, encoded: EncodedSet) -> tuple[float, dict[str, int] | None]:
    """Raise the search effort until recall is enough; returns recall@10 and the setting it took."""
    probes = np.linspace(0, encoded.manifest.rows - 1, min(_PROBES, encoded.manifest.rows)).astype(np.int64)
    probes = np.unique(probes)
    log.info("measuring how much it finds, with %d vectors as queries", len(probes))
    queries = _rows(encoded, probes)
    _, truth = nearest(encoded, queries, _K + 1)
    recall, settings = _recall(index, queries, probes, truth), None
    for name, value in _harder(faiss, index):
        if recall >= _ENOUGH:
            break
        faiss.ParameterSpace().set_index_parameter(index, name, value)
        recall, settings = _recall(index, queries, probes, truth), {name: value}
    return recall, settings


def _harder(faiss: Any, index: Any) -> Iterator[tuple[str, int]]:
    """Yield settings of growing search effort; the last searches everything."""
    try:
        cells = faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        cells = 0
    if cells:
        yield from (("nprobe", min(1 << power, cells)) for power in range(1, cells.bit_length() + 1))
    elif hasattr(faiss.downcast_index(index), "hnsw"):
        yield from (("efSearch", 1 << power) for power in range(5, 11))


def _recall(index: Any, queries: Array, probes: Array, truth: Array) -> float:
    """Return the share of each probe's nearest rows, itself excluded, that the index finds."""
    _, found = index.search(queries, _K + 1)
    shares = []
    for own, near, got in zip(probes, truth, found, strict=True):
        wanted = [row for row in near if row != own][:_K]
        if wanted:
            shares.append(len(set(wanted) & set(got.tolist())) / len(wanted))
    return float(np.mean(shares)) if shares else 1.0


def _state(encoded: EncodedSet) -> str:
    return hashlib.sha256("\n".join(encoded.state()).encode()).hexdigest()[:32]


@contextmanager
def _faiss(wrong: str, instead: str) -> Iterator[None]:
    """Turn FAISS's errors about a factory into ConfigError, with the reason and an alternative."""
    try:
        yield
    except ClipgraftError:
        raise
    except Exception as error:  # RuntimeError, and what its Python layer makes of a wrong kind of index
        # FAISS names its own source lines first.
        told = " ".join(str(error).split()).rpartition("Error: ")[2].rpartition(": ")[2]
        raise ConfigError(f"{wrong} ({told}); take {instead}") from error
