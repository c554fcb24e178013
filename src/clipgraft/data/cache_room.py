"""How large the feature cache may grow, and what makes room in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from clipgraft.data.cache_shards import Kept, list_shards, remove_shard

ENTRY = "clipgraft-features.json"


@dataclass(frozen=True)
class Room:
    """The bytes that shards may take below a folder, on a disk that others fill too."""

    folder: Path
    max_bytes: int

    def shortage(self, needed: int, used: Collection[Path]) -> str | None:
        """Why `needed` more bytes cannot be written, in one line with what to do; None if they can.

        `used` are the index files of shards that must stay.
        """
        return self._plan(needed, used)[0]

    def make(self, needed: int, used: Collection[Path]) -> str | None:
        """As `shortage`; but where they can, the least recently used shards are evicted until they do."""
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
            return f"{what} {bound}: raise --cache-gb", []
        if needed > free + evictable:
            there = f"the {format_bytes(free)} free at {self.folder}"
            return f"{what} {there}: make room, or give --feature-cache a folder on another disk", []
        return None, _oldest(others, max(total + needed - self.max_bytes, needed - free))

    def _entries(self) -> list[Path]:
        """Folders that are ours, in a folder that may hold others."""
        try:
            folders = [path for path in self.folder.iterdir() if not path.is_symlink()]
            return [path for path in folders if (path / ENTRY).is_file()]
        except OSError:
            return []


def format_bytes(count: int) -> str:
    """Megabytes, or gigabytes where there are that many."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _oldest(shards: list[Kept], excess: int) -> list[Kept]:
    """As many from the front as have `excess` bytes together."""
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
    """The folder, or the nearest one above it that exists."""
    # Unlike Path.exists, this is False where a folder above may not be entered.
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))  # noqa: PTH110
