"""Encoded folders that are searched: opened once, and again when they change."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import ConfigError, DataError, UnknownNameError
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.options import nearest
from clipgraft.search.filters import parse_where
from clipgraft.search.folder import EncodedSet, all_sets, check_origin, set_of
from clipgraft.search.index import RECORD, open_index
from clipgraft.search.manifest import INDEX_FOLDER, MANIFEST
from clipgraft.search.searcher import find_hits, thumbnail
from clipgraft.search.store import Array
from clipgraft.serve.messages import FolderInfo

_SIDES = (16, 1024)


@dataclass(frozen=True)
class OpenSet:
    """One set of vectors with its index."""

    encoded: EncodedSet
    index: Any | None

    def search(self, query: Array, k: int, where: str | None) -> tuple[Mapping[str, Any], ...]:
        """(1, D) unit-norm query -> the k nearest rows as flat rows with `rank`, `score`, `row`, `path`.

        `path` is as it was recorded, from the encoded source on: where that lies here concerns no client.
        """
        conditions = () if where is None else parse_where(where)
        hits = find_hits(self.encoded, self.index, query, k, conditions)
        return tuple({**hit.to_dict(), "path": hit.metadata.get("path"), "row": row} for row, hit in hits)


class _Folder:
    """An encoded folder as it was when it was last looked at."""

    def __init__(self, clip: Clip, name: str, path: Path) -> None:
        self._clip = clip
        self.name = name
        self.path = path
        self._lock = threading.Lock()
        self._stamp: object = None
        self._sets: list[EncodedSet] = []
        self._open: dict[str, tuple[object, OpenSet]] = {}

    @property
    def sets(self) -> list[EncodedSet]:
        """Its sets of vectors, read anew if its manifest changed; raises as `all_sets`, `check_origin`."""
        with self._lock:
            stamp = _stamp(self.path / MANIFEST, self.path.parent / MANIFEST)
            if stamp != self._stamp:
                sets = all_sets(self.path)
                check_origin(self.path, sets[0].manifest.origin, self._clip)
                self._sets, self._stamp = sets, stamp
                self._open.clear()
            return self._sets

    def fitting(self, digest: str | None) -> OpenSet:
        """The set that a tower with an adapter of that digest can be compared with."""
        encoded = set_of(f"folder {self.name}", self.sets, digest)
        stamp = _stamp(encoded.place / INDEX_FOLDER / RECORD)
        with self._lock:
            known = self._open.get(encoded.part.folder)
            if known is not None and known[0] == stamp and known[1].encoded is encoded:
                return known[1]
            opened = OpenSet(encoded, open_index(encoded))
            self._open[encoded.part.folder] = (stamp, opened)
            return opened


def _stamp(*places: Path) -> tuple[object, ...]:
    stats = [place.stat() if place.exists() else None for place in places]
    return tuple(None if stat is None else (stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)


class Folders:
    """Encoded folders by name, all of one base; any thread may call it."""

    def __init__(self, clip: Clip, words: Sequence[str]) -> None:
        """`words` are paths, or NAME=PATH.

        Raises:
            ConfigError: two are of one name.
            DataError: nothing is encoded there.
            ModelError: another base made the vectors.
        """
        self._folders: dict[str, _Folder] = {}
        for word in words:
            name, equals, place = word.partition("=")
            if not equals or Path(word).exists():
                name, place = Path(word).resolve().name, word
            if name in self._folders:
                raise ConfigError(f"`folders`: two are called {name}; write NAME=PATH for one")
            self._folders[name] = _Folder(clip, name, Path(place))
            _ = self._folders[name].sets

    def named(self, name: str) -> str:
        """The name of a folder; of the only one where none is given. Raises UnknownNameError."""
        if name in self._folders:
            return name
        if not name and len(self._folders) == 1:
            return next(iter(self._folders))
        if not self._folders:
            raise UnknownNameError("no encoded folder is served: start with `folders`")
        known = ", ".join(list(self._folders)[:8])
        near = nearest(name, list(self._folders))
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {known}"
        raise UnknownNameError(f"no folder {name!r} is served: {hint}")

    def tower(self, name: str) -> Tower:
        """The tower that made the vectors of a folder."""
        return self._folders[name].sets[0].manifest.origin.tower

    def fitting(self, name: str, digest: str | None) -> OpenSet:
        """The set of vectors to search with a tower of an adapter's digest, None for the base's.

        Raises:
            AdapterError: other adapters made the vectors.
            DataError: the folder or its index is damaged.
        """
        return self._folders[name].fitting(digest)

    def infos(self) -> tuple[FolderInfo, ...]:
        """Describe all that can be read."""
        found = []
        for name, folder in self._folders.items():
            manifest = folder.sets[0].manifest
            found.append(FolderInfo(name, str(folder.path), manifest.rows, manifest.origin.kind))
        return tuple(found)

    def thumbnail(self, name: str, row: int, side: int) -> bytes:
        """The image of a row as a small JPEG.

        Raises:
            UnknownNameError: no such folder.
            DataError: no such row, or it has no image that can be opened.
            ConfigError: the side is out of range.
        """
        if not _SIDES[0] <= side <= _SIDES[1]:
            raise ConfigError(f"`side`: got {side}, allowed is {_SIDES[0]} to {_SIDES[1]} pixels")
        name = self.named(name)
        encoded = self._folders[name].sets[0]
        if not 0 <= row < encoded.manifest.rows:
            raise DataError(f"folder {name} has no row {row}: it has {encoded.manifest.rows}")
        place = encoded.image_place(row)
        if place is None:
            raise DataError(f"folder {name} holds texts, and no images to show")
        return thumbnail(place, side)
