"""Read an encoded folder: its sets of vectors, and those that fit a model.

A base with adapters makes one set of vectors for each different tower. An adapter that leaves the tower alone
leaves its vectors as they are: all such adapters share the base's.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from clipgraft.errors import AdapterError, DataError, ModelError
from clipgraft.lora.control import disable_lora, set_adapter
from clipgraft.lora.state import Adapter, lora_state, require_lora, require_unmerged
from clipgraft.models.clip import Clip
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.search.items import location
from clipgraft.search.manifest import (
    AdapterNote,
    Manifest,
    Origin,
    Shard,
    VectorSet,
    is_set_folder,
    read_manifest,
    set_path,
)
from clipgraft.search.store import Array, metadata_columns, plain_rows, read_metadata, read_vectors, widened


@dataclass(frozen=True)
class EncodedSet:
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
        """Shards that hold vectors, in the order of their rows."""
        return tuple(shard for shard in self.manifest.shards if shard.rows)

    def vectors(self, shard: Shard) -> Array:
        """Map a shard's vectors (rows, D). Raises DataError where the file is missing or damaged."""
        return read_vectors(self.folder, self.manifest, self.part, shard)

    def metadata(self, shard: Shard, columns: Sequence[str] | None = None) -> Any:
        """Read a shard's metadata with pyarrow. Raises DataError where the file is missing or damaged."""
        return read_metadata(self.folder, self.manifest, self.part, shard, columns)

    def columns(self) -> list[str]:
        """Return the columns of the metadata."""
        return metadata_columns(self.manifest.origin.kind)

    def blocks(self, rows: int = 1 << 16) -> Iterator[tuple[int, Array]]:
        """Yield (first row, float32 vectors) for all rows of all shards, at most `rows` at a time."""
        start = 0
        for shard in self.shards:
            vectors = self.vectors(shard)
            for first in range(0, shard.rows, rows):
                yield start + first, widened(vectors[first : first + rows])
            start += shard.rows

    def rows(self, numbers: Array) -> list[dict[str, Any]]:
        """Return the metadata of rows as Python values, reading each shard once."""
        starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        shards = np.searchsorted(starts, numbers, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for shard in np.unique(shards):
            own = numbers[shards == shard]
            table = self.metadata(self.shards[shard])
            found.update(zip(own.tolist(), plain_rows(table, (own - starts[shard]).tolist()), strict=True))
        return [found[int(number)] for number in numbers]

    def image_place(self, row: int) -> str | None:
        """Return where the image of a row is; None for a text."""
        return self.place_of(self.rows(np.array([row]))[0])

    def place_of(self, metadata: Mapping[str, Any]) -> str | None:
        """Return where an image is, from the metadata of its row; None for a text."""
        key = metadata.get("path")
        return None if key is None else location(self.manifest.root, key)

    def state(self) -> list[str]:
        """Return the digests of the files that hold the vectors."""
        names = [set_path(self.part.folder, self.manifest.emb, shard.number) for shard in self.shards]
        return [shard.files[name][1] for shard, name in zip(self.shards, names, strict=True)]


def read_folder(folder: str | Path) -> tuple[Path, Manifest, VectorSet | None]:
    """Read the manifest of an encoded folder, or of the folder of one of its sets.

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


def all_sets(folder: str | Path) -> list[EncodedSet]:
    """List the sets of vectors of an encoded folder, or the one that is named; raises as `read_folder`."""
    place, manifest, part = read_folder(folder)
    return [EncodedSet(place, manifest, each) for each in ((part,) if part else manifest.sets)]


def fitting_set(folder: str | Path, clip: Clip) -> EncodedSet:
    """Find the set of vectors that a model in its current state can be compared with.

    Those of its own base, whose tower was changed by what acts on the model, or by nothing if that leaves the
    tower alone.

    Raises:
        DataError: nothing is encoded there.
        ModelError: another base made the vectors.
        AdapterError: another adapter made them.
    """
    candidates = all_sets(folder)
    origin = candidates[0].manifest.origin
    check_origin(folder, origin, clip)
    return set_of(folder, candidates, acting_digest(clip, origin.tower))


def check_origin(folder: str | Path, origin: Origin, clip: Clip) -> None:
    """Raise ModelError where another base made the vectors."""
    if origin.fingerprint != clip.fingerprint:
        mine = f"{clip.source.name or 'this base'} ({clip.fingerprint})"
        raise ModelError(f"{folder}: was encoded by base {origin.base}, not by {mine}; search with that base")


def set_of(folder: str | Path, candidates: Sequence[EncodedSet], digest: str | None) -> EncodedSet:
    """The set of vectors that an adapter of a digest made, or the base for None; raises AdapterError."""
    fitting = [each for each in candidates if each.part.digest == digest]
    if not fitting:
        names = [f"adapter {each.part.adapter}" if each.part.digest else "the base" for each in candidates]
        what = "image" if candidates[0].manifest.origin.tower == "vision" else "text"
        mine = (
            f"the adapter changes the {what} tower" if digest else f"the base's {what} tower is searched with"
        )
        raise AdapterError(
            f"{folder}: its vectors are those of {' and '.join(names)}, but {mine}; search with what made "
            "them, or encode a folder with this adapter"
        )
    return fitting[0]


BASE_FOLDER = "base"


def adapter_digest(adapter: Adapter | None, tower: Tower) -> str | None:
    """Return 16 hex digits that identify an adapter's effect on a tower; None if it has none."""
    if adapter is None or not adapter.touches(tower):
        return None
    parts: dict[str, tuple[float, nn.Module]] = {
        str(site): (layer.scaling, layer) for site, layer in adapter.layers.items() if site.tower == tower
    }
    for path, norm in adapter.norms.items():
        if path.startswith(f"{tower}_model."):
            parts[path] = (1.0, norm)
    digest = hashlib.sha256()
    for name, (scaling, module) in sorted(parts.items()):
        for part, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{part} {scaling!r} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:16]


def acting_digest(clip: Clip, tower: Tower) -> str | None:
    """Return `adapter_digest` of the active adapter; raises AdapterError while adapters are merged."""
    require_unmerged(clip, "tell whose vectors these are")
    state = lora_state(clip)
    return adapter_digest(None if state is None else state.in_effect, tower)


def vector_sets(clip: Clip, adapters: Sequence[str] | None, tower: Tower) -> tuple[VectorSet, ...]:
    """List the sets of vectors to make: one at the root for the active adapter, or one per named adapter.

    Raises:
        AdapterError: the model carries no such adapter, or one is called like the folder of the base.
    """
    require_unmerged(clip, "encode with adapters")
    if adapters is None:
        state = lora_state(clip)
        digest = acting_digest(clip, tower)
        return (VectorSet("", state.active if state and digest else None, digest),)
    state = require_lora(clip)
    found: dict[str | None, VectorSet] = {}
    for name in adapters:
        if name == BASE_FOLDER or not is_set_folder(name):
            raise AdapterError(
                f"adapter {name!r} would be taken for another folder: load it under another name"
            )
        digest = adapter_digest(state.named(name), tower)
        folder, adapter = (BASE_FOLDER, None) if digest is None else (name, name)
        found.setdefault(digest, VectorSet(folder, adapter, digest))
    return tuple(found.values())


def sharing(clip: Clip, names: Sequence[str], tower: Tower) -> list[str]:
    """Return the names of adapters that leave a tower unchanged."""
    state = require_lora(clip)
    return [name for name in names if adapter_digest(state.named(name), tower) is None]


def adapter_notes(clip: Clip, names: Sequence[str], paths: Mapping[str, str]) -> tuple[AdapterNote, ...]:
    """Describe adapters for the manifest, those that share vectors included."""
    notes = []
    for name in names:
        adapter = require_lora(clip).named(name)
        digests: dict[str, str] = {
            tower: found for tower in TOWERS if (found := adapter_digest(adapter, tower))
        }
        notes.append(AdapterNote(name, paths.get(name, ""), digests))
    return tuple(notes)


@contextlib.contextmanager
def adapters_as_they_were(clip: Clip) -> Iterator[None]:
    """Restore the active adapter at the end."""
    state = lora_state(clip)
    before = (state.active, state.enabled) if state else None
    try:
        yield
    finally:
        if before is not None:
            set_adapter(clip, before[0])
            if not before[1]:
                disable_lora(clip)
