"""Cache features of a frozen tower on disk, for every run with the same base and images.

One folder an entry, named by what its values depend on besides the image (`FeatureKey`), in it shards
(`stored_rows`). An image is found by its file's identity, so a file that changed is computed again and a
table that grew costs its new images alone. Readers and writers need no lock: files appear whole, under names
of their own, and are never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipgraft.data.args import CacheArgs
from clipgraft.data.stored_rows import (
    ID_BYTES,
    Array,
    Compute,
    Kept,
    Shard,
    ShardError,
    StoredRows,
    array_dtype,
    file_ids,
    list_shards,
    mark_used,
    open_rows,
    read_shard,
    remove_shard,
    to_array,
    write_shard,
)
from clipgraft.errors import WriteError
from clipgraft.files import cache_folder, write_json
from clipgraft.writing import writing

log = logging.getLogger("clipgraft")
ENTRY = "clipgraft-features.json"
FORMAT = 1
_DIGITS = 32


@dataclass(frozen=True)
class FeatureKey:
    """What stored values depend on besides the image file.

    Attributes:
        tower: fingerprint of the image tower.
        preprocessing: every step from the decoded image to the tower's input, with its parameters.
        stored: what is kept of an image, "image features" or "input of vision block 9".
        precision: what it was computed in.
        dtype: what it is kept in, a torch dtype's name.
    """

    tower: str
    preprocessing: str
    stored: str
    precision: str
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def digest(self) -> str:
        """Return 32 hex digits."""
        # `shortest` was once a field, and is in the names of entries that exist.
        text = json.dumps({"format": FORMAT, "shortest": None, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def default_folder() -> Path:
    """Return the folder `features` in the folder that caches share."""
    return cache_folder() / "features"


@dataclass(frozen=True)
class Room:
    """A limit on the bytes of shards below a folder, on a disk that others fill too."""

    folder: Path
    max_bytes: int

    def shortage(self, needed: int, used: Collection[Path]) -> str | None:
        """Say why `needed` more bytes cannot be written and what to do; None if they can.

        `used` are the index files of shards that must stay.
        """
        return self._plan(needed, used)[0]

    def make(self, needed: int, used: Collection[Path]) -> str | None:
        """Evict the least recently used shards until `needed` bytes fit; else answer as `shortage`."""
        shortage, evicted = self._plan(needed, used)
        for kept in evicted:
            remove_shard(kept.index)
        for entry in {kept.index.parent for kept in evicted}:
            _remove_if_empty(entry)
        return shortage

    def _plan(self, needed: int, used: Collection[Path]) -> tuple[str | None, list[Kept]]:
        shards = [kept for entry in self._entries() for kept in list_shards(entry)]
        others = sorted((kept for kept in shards if kept.index not in used), key=lambda kept: kept.used)
        total, evictable = (sum(kept.bytes for kept in some) for some in (shards, others))
        free = shutil.disk_usage(_existing(self.folder)).free
        what = f"{format_bytes(needed)} of features would not fit"
        if total - evictable + needed > self.max_bytes:
            bound = f"the {format_bytes(self.max_bytes)} of the feature cache {self.folder}"
            return f"{what} {bound}: raise `cache_gb`", []
        if needed > free + evictable:
            there = f"the {format_bytes(free)} free at {self.folder}"
            return f"{what} {there}: make room, or give `feature_cache` a folder on another disk", []
        return None, _oldest(others, max(total + needed - self.max_bytes, needed - free))

    def _entries(self) -> list[Path]:
        """List entries of the cache, in a folder that may hold other folders."""
        try:
            folders = [path for path in self.folder.iterdir() if not path.is_symlink()]
            return [path for path in folders if (path / ENTRY).is_file()]
        except OSError:
            return []


@dataclass
class _Found:
    """The shards that hold wanted images, and where each image lies: id -> (shard, row)."""

    shards: list[Shard] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)
    place: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    @property
    def used(self) -> set[Path]:
        """Return the index files of the shards."""
        return {shard.index for shard in self.shards}


class FeatureCache:
    """A folder of features, bounded in size; safe to share between threads and processes.

    Nothing that is wrong with the folder stops a run: what cannot be read is computed, what cannot be written
    is kept in memory, and one line says so.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: float = 20e9,
        shard_bytes: int = 64 << 20,
        shard_seconds: float = 30.0,
    ) -> None:
        """`max_bytes` bounds the folder. A killed build loses at most `shard_bytes`, or `shard_seconds`."""
        self.folder = folder
        self.room = Room(folder, int(max_bytes))
        self.shard_bytes = shard_bytes
        self.shard_seconds = shard_seconds

    def get_or_compute(
        self,
        key: FeatureKey,
        paths: Sequence[Path],
        compute: Compute,
        *,
        label: str = "image features",
        item_shape: tuple[int, ...] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> StoredRows:
        """Return one row for each path, in order; compute only images that the cache does not hold.

        Args:
            key: what the values depend on besides the image.
            paths: image files, at least one.
            compute: called at most once, with the images that are missing, each once.
            label: begins the line that says how many images were known.
            item_shape: of one row, where it is known: the size is then checked before anything is computed,
                else after the first batch.
            progress: told how many images were known.
        """
        ids = file_ids(paths)
        found = self._find(key, set(ids), check=True, item_shape=item_shape)
        _say_damage(found.damage, self.folder / key.digest)
        missing = {name: path for name, path in zip(ids, paths, strict=True) if name not in found.place}
        known = sum(name in found.place for name in ids)
        if progress is not None and known:
            progress(known)
        if missing:
            build = _Build(self, key, list(missing), label, found)
            build.run(list(missing.values()), compute, item_shape)
        counts = f"{known:,} from the cache, {len(missing):,} encoded"
        log.info("%s: %s images, %s", label, f"{len(ids):,}", counts)
        places = np.array([found.place[name] for name in ids], np.int64)
        return StoredRows(found.arrays, places[:, 0], places[:, 1], key.torch_dtype)

    def shortage(self, key: FeatureKey, paths: Sequence[Path], row_bytes: int) -> str | None:
        """Say why values of these images would not be written and what to do; None if they would.

        For callers that can do better than to keep all of them in memory. Nothing is evicted yet.
        """
        ids = set(file_ids(paths))
        found = self._find(key, ids, check=False)
        needed = (len(ids) - len(found.place)) * (row_bytes + ID_BYTES)
        return self.room.shortage(needed, found.used)

    def _find(
        self,
        key: FeatureKey,
        wanted: set[bytes],
        *,
        check: bool,
        item_shape: tuple[int, ...] | None = None,
    ) -> _Found:
        """Find the rows of `wanted` in an entry; with `check`, verify and open arrays, and drop damage.

        All arrays have items of one shape, `item_shape` where it is known.
        """
        found = _Found()
        dtype = array_dtype(key.torch_dtype)
        for kept in list_shards(self.folder / key.digest):
            try:
                shard = read_shard(kept.index)
                rows = {
                    name: row
                    for row, name in enumerate(shard.ids)
                    if name in wanted and name not in found.place
                }
                if rows and check:
                    array = open_rows(shard)
                    if array.dtype != dtype or array.shape[1:] != (item_shape or array.shape[1:]):
                        raise ShardError(f"its array is {array.dtype} of the shape {array.shape}")
                    item_shape = array.shape[1:]
                    found.arrays.append(array)
                    mark_used(shard)
            except ShardError as damage:
                if check:
                    found.damage.append(str(damage))
                    remove_shard(kept.index)
                continue
            except OSError:  # evicted at this moment, or not ours to read
                continue
            if rows:
                found.place.update({name: (len(found.shards), row) for name, row in rows.items()})
                found.shards.append(shard)
        return found


class _Build:
    """One computation of missing rows, written shard by shard where there is room, else kept in memory."""

    def __init__(
        self, cache: FeatureCache, key: FeatureKey, ids: list[bytes], label: str, found: _Found
    ) -> None:
        self.cache, self.key, self.ids, self.label, self.found = cache, key, ids, label, found
        self.folder = cache.folder / key.digest
        self.writing: bool | None = None
        self.pending: list[Array] = []
        self.done = 0
        self.since = time.monotonic()

    def run(self, paths: Sequence[Path], compute: Compute, item_shape: tuple[int, ...] | None) -> None:
        """Compute, write and extend `found`; rows that are done when `compute` fails are kept as well."""
        if item_shape is not None:
            self._decide(int(np.prod(item_shape)) * self.key.torch_dtype.itemsize)
        try:
            compute(paths, self._add)
        finally:
            if self.pending:
                self._flush()
            if self.writing:  # another process may have written beside this one
                self.cache.room.make(0, self.found.used)
        if self.done != len(self.ids):
            raise RuntimeError(f"{self.done} rows were computed for {len(self.ids)} images")

    def _add(self, rows: Tensor) -> None:
        array = to_array(rows, self.key.torch_dtype)
        if self.writing is None:
            self._decide(array[0].nbytes)
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append(array)
        full = sum(part.nbytes for part in self.pending) >= self.cache.shard_bytes
        if full or time.monotonic() - self.since >= self.cache.shard_seconds:
            self._flush()

    def _decide(self, row_bytes: int) -> None:
        """Decide whether all missing rows will fit, before any of them is written."""
        needed = len(self.ids) * (row_bytes + ID_BYTES)
        shortage = self.cache.room.make(needed, self.found.used)
        self.writing = shortage is None
        if shortage is not None:
            log.warning("%s: features are kept in memory only: %s", self.label, shortage)
            return
        where, images = self.cache.folder, f"{len(self.ids):,}"
        log.info("%s: %s images to encode, %s to keep in %s", self.label, images, format_bytes(needed), where)

    def _flush(self) -> None:
        rows = self.pending[0] if len(self.pending) == 1 else np.concatenate(self.pending)
        self.pending.clear()
        ids = self.ids[self.done : self.done + len(rows)]
        if self.writing:
            try:
                with writing(self.folder):
                    rows = self._write(ids, rows)
            except WriteError as error:
                self._give_up(error)
        part = len(self.found.arrays)
        self.found.arrays.append(rows)
        self.found.place.update({name: (part, row) for row, name in enumerate(ids)})
        self.done += len(rows)

    def _write(self, ids: list[bytes], rows: Array) -> Array:
        """Write rows and return them mapped from disk. Raises WriteError."""
        if not (self.folder / ENTRY).exists():  # the first shard, or the entry was evicted meanwhile
            write_json(self.folder / ENTRY, asdict(self.key))
        shard, mapped = write_shard(self.folder, ids, rows, self.key.dtype)
        self.found.shards.append(shard)
        return mapped

    def _give_up(self, error: WriteError) -> None:
        self.writing = False
        log.warning(
            "%s: features are kept in memory only: %s; make room, or give `feature_cache` another folder, or "
            "'none'",
            self.label,
            error.what,
        )


def _say_damage(damage: Sequence[str], folder: Path) -> None:
    if damage:
        reasons = "; ".join(dict.fromkeys(damage))
        what = "a damaged shard was" if len(damage) == 1 else f"{len(damage)} damaged shards were"
        log.warning("feature cache %s: %s dropped (%s); its images are encoded again", folder, what, reasons)


def format_bytes(count: int) -> str:
    """Format a size in MB, or in GB from one GB on."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _oldest(shards: list[Kept], excess: int) -> list[Kept]:
    """Return as many shards from the front as have `excess` bytes together."""
    chosen: list[Kept] = []
    for kept in shards:
        if excess <= 0:
            break
        chosen.append(kept)
        excess -= kept.bytes
    return chosen


def _remove_if_empty(entry: Path) -> None:
    with contextlib.suppress(OSError):
        if {path.name for path in entry.iterdir()} == {ENTRY}:  # another process may be writing a shard here
            (entry / ENTRY).unlink()
            entry.rmdir()


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    # Unlike Path.exists, this is False where a folder above may not be entered.
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))  # noqa: PTH110


def open_cache(features: CacheArgs) -> FeatureCache | None:
    """The feature cache that options name; None where they name none."""
    if features.feature_cache is None:
        return None
    return FeatureCache(features.feature_cache, max_bytes=features.cache_gb * 1e9)
