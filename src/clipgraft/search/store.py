"""The encoded folder on disk: shards are written, committed, compacted and read here.

A step is: write a shard's files under a number that no file has, list it in the manifest, and remove the
files of the shard that it replaces. Whenever that is cut off, what the manifest lists is whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipgraft.errors import DataError
from clipgraft.files import atomic_path, sweep_partial
from clipgraft.search.lock import LOCK
from clipgraft.search.manifest import (
    ERRORS,
    MANIFEST,
    METADATA,
    VECTORS,
    Manifest,
    Shard,
    VectorSet,
    read_manifest,
    set_path,
    write_manifest,
)
from clipgraft.search.plan import Kept, StoredRow
from clipgraft.search.tables import (
    ErrorRow,
    MetaRow,
    content_key,
    error_table,
    metadata_table,
    read_table,
    replace_captions,
    stored_errors,
    stored_rows,
    write_table,
)

log = logging.getLogger("clipgraft")
Array = npt.NDArray[Any]
WORK = ".work"
ERRORS_FILE = "errors.parquet"


@dataclass(frozen=True)
class Rows:
    """What a shard is made of: rows, their vectors (N, D) by the set's folder, and what could not be used."""

    rows: Sequence[MetaRow]
    vectors: Mapping[str, Array]
    errors: Sequence[ErrorRow]


class Store:
    """An encoded folder that is being written; the caller is its sole writer."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._emb = VECTORS[manifest.made.kind]

    def begin(self) -> None:
        """Write the manifest, and remove what killed runs left."""
        write_manifest(self.folder, self.manifest)
        sweep_partial(self.folder)
        listed = {name for shard in self.manifest.shards for name in shard.files}
        for name in self._numbered():
            if name not in listed:
                (self.folder / name).unlink()

    def drop_damaged(self) -> None:
        """Unlist shards whose files are gone or of another size; their items are encoded again."""
        for shard in self.manifest.shards:
            wrong = [name for name, (size, _) in shard.files.items() if _size(self.folder / name) != size]
            if wrong:
                log.warning(
                    "%s: damaged or missing; the %d rows of shard %d are encoded again",
                    self.folder / wrong[0],
                    shard.rows,
                    shard.number,
                )
                self._commit(shard, None)

    def stored(self, shard: Shard, errors: bool = True) -> Iterator[StoredRow]:
        """The rows of a finished shard and, with `errors`, what could not be used."""
        if shard.rows:
            where = set_path(self.manifest.sets[0].folder, METADATA, shard.number)
            yield from stored_rows(read_table(self.folder / where))
        if shard.errors and errors:
            yield from stored_errors(read_table(self.folder / set_path("", ERRORS, shard.number)))

    def add(self, rows: Rows) -> None:
        """Write a new shard and list it."""
        made, metadata = self.manifest.made, {}
        for part in self.manifest.sets if rows.rows else ():
            metadata[part] = metadata_table(rows.rows, made.kind, part.adapter, made.fingerprint)
            if self.manifest.dim is None:
                self.manifest = replace(self.manifest, dim=int(rows.vectors[part.folder].shape[1]))
        errors = error_table(rows.errors) if rows.errors else None
        return self._put(
            None, {part: (table, rows.vectors[part.folder]) for part, table in metadata.items()}, errors
        )

    def compact(self, shard: Shard, kept: Kept) -> None:
        """Put a shard with fewer rows, or other captions, in the place of one; vectors keep every bit."""
        written, errors = {}, None
        for part in self.manifest.sets if kept.rows else ():
            table = read_table(self.folder / set_path(part.folder, METADATA, shard.number))
            vectors = np.load(self.folder / set_path(part.folder, self._emb, shard.number), mmap_mode="r")
            table = replace_captions(table.take(list(kept.rows)), kept.captions)
            written[part] = (table, vectors[list(kept.rows)])
        if kept.errors:
            table = read_table(self.folder / set_path("", ERRORS, shard.number))
            errors = table.filter([path in kept.errors for path in table.column("path").to_pylist()])
        self._put(shard, written, errors)

    def finish(self) -> Path:
        """Gather what could not be used in one table; returns its path."""
        numbers = [shard.number for shard in self.manifest.shards if shard.errors]
        parts = [read_table(self.folder / set_path("", ERRORS, number)) for number in numbers]
        write_table(self.folder / ERRORS_FILE, error_table((), parts))
        return self.folder / ERRORS_FILE

    def _put(self, old: Shard | None, sets: Mapping[VectorSet, tuple[Any, Array]], errors: Any) -> None:
        """Write the tables and vectors of a new shard, and list it in the place of an old one."""
        number, names = self.manifest.next, list[str]()
        for part, (table, vectors) in sets.items():
            emb, meta = (set_path(part.folder, kind, number) for kind in (self._emb, METADATA))
            with atomic_path(self.folder / emb) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
            write_table(self.folder / meta, table)
            names += [emb, meta]
        if errors is not None:
            names.append(set_path("", ERRORS, number))
            write_table(self.folder / names[-1], errors)
        metadata = next((table for table, _ in sets.values()), None)
        rows, unusable = (0 if table is None else table.num_rows for table in (metadata, errors))
        files = {name: _checked(self.folder / name) for name in names}
        new = Shard(number, rows, unusable, content_key(metadata, errors), files) if names else None
        self._commit(old, new)

    def _commit(self, old: Shard | None, new: Shard | None) -> None:
        changed = self.manifest.swapped(old, new)
        self.manifest = replace(changed, next=changed.next + 1) if new else changed
        write_manifest(self.folder, self.manifest)
        for name in old.files if old else ():
            (self.folder / name).unlink(missing_ok=True)

    def _numbered(self) -> Iterator[str]:
        """Every file on disk with the name of a shard's."""
        places = [(part.folder, kind) for part in self.manifest.sets for kind in (self._emb, METADATA)]
        for folder, kind in [*places, ("", ERRORS)]:
            for path in (self.folder / folder / kind).glob(f"{kind}_*"):
                if path.stem.removeprefix(f"{kind}_").isdecimal():
                    yield path.relative_to(self.folder).as_posix()


def open_folder(folder: Path) -> Manifest | None:
    """The manifest of a folder that is to be written to; None for a new one.

    Raises DataError where the folder is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder to write to")
    manifest = read_manifest(folder)
    if manifest is None and folder.is_dir():
        ours = {LOCK, WORK}
        strange = sorted(
            path.name
            for path in folder.iterdir()
            if path.name not in ours and not path.name.startswith(f".{MANIFEST}")
        )
        if strange:
            raise DataError(
                f"{folder}: is not empty ({strange[0]}) and has no {MANIFEST}; name a new folder to write to"
            )
    return manifest


def _checked(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return file.tell(), digest.hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
