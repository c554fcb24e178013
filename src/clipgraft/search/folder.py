"""An encoded folder as a search reads it: which vectors fit a model, and shards one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.errors import AdapterError, DataError, ModelError
from clipgraft.models.clip import Clip
from clipgraft.search.manifest import (
    METADATA,
    Manifest,
    Shard,
    VectorSet,
    read_manifest,
    set_path,
    shard_file,
)
from clipgraft.search.sets import acting_digest
from clipgraft.search.store import Array, read_vectors
from clipgraft.search.tables import metadata_columns, read_metadata


@dataclass(frozen=True)
class Encoded:
    """One set of vectors of an encoded folder.

    Attributes:
        folder: the encoded folder, where the manifest is.
        manifest: what it says.
        part: the set.
    """

    folder: Path
    manifest: Manifest
    part: VectorSet

    @property
    def place(self) -> Path:
        """The folder of this set: the encoded folder, or one in it."""
        return self.folder / self.part.folder

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those that hold vectors, in the order of their rows."""
        return tuple(shard for shard in self.manifest.shards if shard.rows)

    def vectors(self, shard: Shard) -> Array:
        """(rows, D) of a shard, memory-mapped. Raises DataError where the file is missing or damaged."""
        return read_vectors(self.folder, self.manifest, self.part, shard)

    def metadata(self, shard: Shard, columns: Sequence[str] | None = None) -> Any:
        """The pyarrow table of a shard. Raises DataError where the file is missing or damaged."""
        path = shard_file(self.folder, self.part.folder, METADATA, shard.number)
        known = shard.files[set_path(self.part.folder, METADATA, shard.number)]
        return read_metadata(path, self.manifest.made.kind, known, shard.rows, columns)

    def columns(self) -> list[str]:
        """The columns of the metadata."""
        return metadata_columns(self.manifest.made.kind)

    def blocks(self, rows: int = 1 << 16) -> Iterator[tuple[int, Array]]:
        """(first row, float32 vectors) for all rows of all shards, at most `rows` at a time."""
        start = 0
        for shard in self.shards:
            vectors = self.vectors(shard)
            for first in range(0, shard.rows, rows):
                block = np.asarray(vectors[first : first + rows], np.float32)
                yield start + first, block
            start += shard.rows

    def state(self) -> list[str]:
        """What changes when the vectors do: the digests of the files that hold them."""
        names = [set_path(self.part.folder, self.manifest.emb, shard.number) for shard in self.shards]
        return [shard.files[name][1] for shard, name in zip(self.shards, names, strict=True)]


def read_folder(folder: str | Path) -> tuple[Path, Manifest, VectorSet | None]:
    """The encoded folder that a path names, and the one set if it is that of a set.

    Raises:
        DataError: nothing is encoded there.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        return folder, manifest, None
    above = read_manifest(folder.parent)
    found = [part for part in above.sets if part.folder == folder.name] if above else []
    if above is None or not found:
        raise DataError(f"{folder}: holds no encoded images or texts; make it with `clipgraft encode`")
    return folder.parent, above, found[0]


def all_sets(folder: str | Path) -> list[Encoded]:
    """Every set of vectors of a folder, or the one it is the folder of; raises DataError as `read_folder`."""
    place, manifest, part = read_folder(folder)
    return [Encoded(place, manifest, each) for each in ((part,) if part else manifest.sets)]


def fitting_set(folder: str | Path, clip: Clip) -> Encoded:
    """The vectors that a model as it is now can be compared with.

    Those of its own base, whose tower was changed by what acts on the model, or by nothing if that leaves the
    tower alone.

    Raises:
        DataError: nothing is encoded there.
        ModelError: another base made the vectors.
        AdapterError: another adapter made them.
    """
    candidates = all_sets(folder)
    made = candidates[0].manifest.made
    if made.fingerprint != clip.fingerprint:
        mine = f"{clip.source.name or 'this base'} ({clip.fingerprint})"
        raise ModelError(f"{folder}: was encoded by base {made.base}, not by {mine}; search with that base")
    digest = acting_digest(clip, made.tower)
    fitting = [each for each in candidates if each.part.digest == digest]
    if not fitting:
        names = [f"adapter {each.part.adapter}" if each.part.digest else "the base" for each in candidates]
        what = "image" if made.tower == "vision" else "text"
        mine = (
            f"the adapter changes the {what} tower" if digest else f"the base's {what} tower is searched with"
        )
        raise AdapterError(
            f"{folder}: its vectors are those of {' and '.join(names)}, but {mine}; search with what made "
            "them, or encode a folder with this adapter"
        )
    return fitting[0]
