"""Keep one row of values for each image, in memory or in files of which every byte is checked.

Rows on disk lie in shards. `NAME.npy` is an array (rows, *item). `NAME.index`, written after it, makes it
count: one line of JSON with the array's size and checksum, the 16-byte ids of the rows, and a digest of both.
Names are random, so that two writers never meet; the index's modification time is when the shard was last
used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipgraft.errors import DataError
from clipgraft.files import atomic_path, sweep_partial
from clipgraft.readers import map_array
from clipgraft.records import Whole, parse_json
from clipgraft.stored_images import image_state

Array: TypeAlias = npt.NDArray[Any]
Compute: TypeAlias = Callable[[Sequence[Path], Callable[[Tensor], None]], None]
"""compute(paths, add): call `add` with (n, *item) rows, batch after batch, in the order of `paths`."""


@dataclass(frozen=True)
class RowKind:
    """What is kept of each image.

    Attributes:
        stored: its name: "image features", or "input of vision block 9".
        dtype: what values are kept in.
        shape: of one row, where it is known before the first row is computed.
    """

    stored: str = "image features"
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] | None = None


FEATURES = RowKind()
ID_BYTES = 16
INDEX, DATA = ".index", ".npy"
_DIGEST_BYTES, _BLOCK = 16, 1 << 24
_ABANDONED_AFTER = 3600.0  # seconds after which a file without an index is no writer's work in progress
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


class StoredRows:
    """(N, *item) values of one dtype, read when they are asked for.

    `rows[ids]` is a tensor of its own, (n, *item) on the CPU, for an int64 tensor of ids (n,). Memory-mapped
    rows cost memory only while the system has it to spare.
    """

    def __init__(
        self,
        parts: Sequence[Array],
        part: npt.NDArray[np.int64],
        row: npt.NDArray[np.int64],
        dtype: torch.dtype,
    ) -> None:
        """Item `i` is `parts[part[i]][row[i]]`; bfloat16 parts are int16 arrays of the same bits."""
        self._parts = [np.asarray(array) for array in parts]
        self._part, self._row = part, row
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *item)."""
        return (len(self), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, ids: Tensor) -> Tensor:
        wanted = ids.cpu().numpy()
        part, row = self._part[wanted], self._row[wanted]
        found = np.empty((len(wanted), *self.shape[1:]), self._parts[0].dtype)
        order = np.argsort(part, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if len(mine):
                found[mine] = self._parts[part[mine[0]]][row[mine]]
        return to_tensor(found, self.dtype)

    def tensor(self) -> Tensor:
        """Return all rows, (N, *item). Rows in order in one file stay there, mapped copy-on-write."""
        first, start = self._part[0], self._row[0]
        in_order = np.arange(start, start + len(self))
        if (self._part == first).all() and np.array_equal(self._row, in_order):
            return to_tensor(self._parts[first][start : start + len(self)], self.dtype)
        return self[torch.arange(len(self))]


def computed_rows(paths: Sequence[Path], compute: Compute, dtype: torch.dtype) -> StoredRows:
    """Compute rows and keep them in memory, (len(paths), *item)."""
    arrays: list[Array] = []
    compute(paths, lambda rows: arrays.append(to_array(rows, dtype)))
    return _in_order(np.concatenate(arrays), dtype)


def rows_in_memory(rows: Tensor) -> StoredRows:
    """Wrap the rows of a tensor, (N, *item)."""
    return _in_order(to_array(rows, rows.dtype), rows.dtype)


def _in_order(whole: Array, dtype: torch.dtype) -> StoredRows:
    return StoredRows([whole], np.zeros(len(whole), np.int64), np.arange(len(whole)), dtype)


def to_tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """View an array as a tensor; bfloat16, which numpy lacks, is int16 of the same bits."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the array type that `to_array` makes of a dtype."""
    made: np.dtype[Any] = to_array(torch.empty(0), dtype).dtype
    return made


def to_array(tensor: Tensor, dtype: torch.dtype) -> Array:
    """Cast a tensor to `dtype`, as an array on the CPU; bfloat16 becomes int16 of the same bits."""
    cast = tensor.detach().to("cpu", dtype).contiguous()
    array: Array = (cast.view(torch.int16) if dtype == torch.bfloat16 else cast).numpy()
    return array


def available_memory() -> int | None:
    """Return the bytes that can be used without swapping or being killed; None where unknown."""
    known = [count for count in (_of_system(), _of_container()) if count is not None]
    return min(known) if known else None


def _of_system() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kibibytes)
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_container() -> int | None:
    """Return what a control group leaves; cached files count as used, which errs on the safe side."""
    try:
        limit, used = (
            int((_GROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # not in a group, or "max"
        return None
    return max(0, limit - used)


def file_ids(paths: Sequence[Path]) -> list[bytes]:
    """Hash absolute path, size and modification time (ns) of each file to 16 bytes.

    Links are followed for size and time but named as they stand. A file that cannot be looked at gets an id
    as well: whoever opens it next says what is wrong with it.
    """
    here = Path.cwd()
    return [_file_id(os.path.normpath(here / path)) for path in paths]


def _file_id(path: str) -> bytes:
    try:
        size, modified, place = image_state(path)
    except (OSError, tarfile.TarError, DataError):
        size, modified, place = -1, 0, ""
    name = os.fsencode(f"{path}\0{place}" if place else path)
    return hashlib.blake2b(b"%b\0%d\0%d" % (name, size, modified), digest_size=ID_BYTES).digest()


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
    """Map the rows of a shard into memory after one sequential read that checks every byte.

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


def remove_shard(index: Path) -> None:
    """Delete a shard, its index first; one that the system does not let go stays."""
    with contextlib.suppress(OSError):
        index.unlink(missing_ok=True)
        index.with_suffix(DATA).unlink(missing_ok=True)


@dataclass(frozen=True)
class Kept:
    """What eviction needs of a shard: when it was last used (ns), its bytes on disk, its index file."""

    used: int
    bytes: int
    index: Path


def list_shards(folder: Path) -> Iterator[Kept]:
    """List the shards of one entry, and remove what killed writers left there."""
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
    """List a folder that others write to; raises OSError."""
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Between the listing and the look at it, another process may have renamed or removed it.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    files[entry.name] = entry.stat()
    return files


def _map(path: Path) -> np.memmap[Any, Any]:
    """Map a file copy-on-write: a caller that writes into its features must not change the cache."""
    array: np.memmap[Any, Any] = map_array(path, mode="c")
    return array


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
