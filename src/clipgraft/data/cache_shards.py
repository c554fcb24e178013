"""Shards of the feature cache: an array of rows, and beside it the index that says whose rows they are.

`NAME.npy` is a plain array (rows, *item). `NAME.index`, written after it, makes it count: one line of JSON
with the array's size and checksum, the 16-byte ids of the rows, and a digest of both. Names are drawn at
random, so that two writers never meet; the index's modification time is when the shard was last used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.data.file_identity import ID_BYTES
from clipgraft.data.stored_rows import Array
from clipgraft.errors import DataError
from clipgraft.files import atomic_path, sweep_partial
from clipgraft.readers import map_array
from clipgraft.records import Whole, parse_json

INDEX, DATA = ".index", ".npy"
_DIGEST_BYTES, _BLOCK = 16, 1 << 24
_ABANDONED_AFTER = 3600.0  # seconds after which a file without an index is no writer's work in progress


class ShardError(Exception):
    """What is wrong with a shard, in a few words."""


@dataclass(frozen=True)
class _Head:
    """The first line of an index."""

    rows: Whole
    dtype: str
    bytes: Whole
    crc32: Whole


@dataclass(frozen=True)
class Shard:
    """A shard whose index was read and is whole; its array has not been looked at.

    Attributes:
        index: path of the index file.
        ids: of every row.
        dtype: name of the torch dtype of the values.
        data_bytes, crc32: of the array file.
    """

    index: Path
    ids: tuple[bytes, ...]
    dtype: str
    data_bytes: int
    crc32: int

    @property
    def data(self) -> Path:
        return self.index.with_suffix(DATA)


def write_shard(folder: Path, ids: Sequence[bytes], rows: Array, dtype: str) -> tuple[Shard, Array]:
    """Write rows and then their index; both are on disk, or the shard does not count. Raises WriteError."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(rows))
    head, body = buffer.getvalue(), memoryview(rows).cast("B")
    crc = zlib.crc32(body, zlib.crc32(head))
    index = folder / f"{secrets.token_hex(8)}{INDEX}"
    shard = Shard(index, tuple(ids), dtype, len(head) + len(body), crc)
    with atomic_path(shard.data, shard.data_bytes) as temporary, temporary.open("wb") as file:
        file.write(head)
        file.write(body)
    line = json.dumps({"rows": len(ids), "dtype": dtype, "bytes": shard.data_bytes, "crc32": crc})
    content = line.encode() + b"\n" + b"".join(ids)
    with atomic_path(index) as temporary:
        temporary.write_bytes(content + _digest(content))
    return shard, _map(shard.data)


def read_shard(index: Path) -> Shard:
    """Read an index. Raises ShardError, or FileNotFoundError where another process took it away."""
    content = index.read_bytes()
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if _digest(body) != digest:
        raise ShardError("its index is damaged")
    line, _, ids = body.partition(b"\n")
    try:
        head = parse_json(line, _Head, str(index))
    except DataError as error:
        raise ShardError("its index is damaged") from error
    named = tuple(ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES))
    if len(ids) != head.rows * ID_BYTES:
        raise ShardError("its index is damaged")
    return Shard(index, named, head.dtype, head.bytes, head.crc32)


def open_rows(shard: Shard) -> Array:
    """The rows of a shard, memory-mapped, after one sequential read that checks every byte.

    Raises ShardError, or FileNotFoundError where another process took the shard away.
    """
    try:
        size, crc = 0, 0
        with shard.data.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except FileNotFoundError:
        if shard.index.exists():
            raise ShardError("its array is missing") from None
        raise
    if size != shard.data_bytes:
        raise ShardError(f"its array has {size:,} bytes instead of {shard.data_bytes:,}")
    if crc != shard.crc32:
        raise ShardError("the checksum of its array differs")
    try:
        array = _map(shard.data)
    except DataError as error:
        raise ShardError("its array cannot be read") from error
    if array.shape[:1] != (len(shard.ids),) or array.nbytes + array.offset != size:
        raise ShardError(f"its array has the shape {array.shape}")
    return array


def mark_used(shard: Shard) -> None:
    """Make this the shard that is evicted last; a cache that can only be read stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(shard.index)


def remove_shard(index: Path) -> int:
    """Delete a shard, its index first; returns the bytes freed, 0 where the system does not let it go."""
    freed = 0
    for path in (index, index.with_suffix(DATA)):
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError:
            return freed
        freed += size
    return freed


@dataclass(frozen=True)
class Kept:
    """A shard as the eviction sees it: when it was last used (ns), its bytes on disk, its index file."""

    used: int
    bytes: int
    index: Path


def list_shards(folder: Path) -> Iterator[Kept]:
    """The shards of one entry; what killed writers left there is removed on the way."""
    try:
        sweep_partial(folder)
        files = _files(folder)
    except OSError:
        return
    for name, status in files.items():
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - names, not paths
        if suffix == DATA and stem + INDEX not in files:
            if time.time() - status.st_mtime > _ABANDONED_AFTER:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
        elif suffix == INDEX:
            data = files.get(stem + DATA)
            size = status.st_size + (data.st_size if data else 0)
            yield Kept(status.st_mtime_ns, size, folder / name)


def _files(folder: Path) -> dict[str, os.stat_result]:
    """What lies in a folder that others write to; raises OSError."""
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Between the listing and the look at it, another process may have renamed or removed it.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    files[entry.name] = entry.stat()
    return files


def _map(path: Path) -> np.memmap[Any, Any]:
    """Copy-on-write: a caller that writes into its features must not write into the cache."""
    array: np.memmap[Any, Any] = map_array(path, mode="c")
    return array


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
