"""`manifest.json`: what an encoded folder holds, made by which base and adapters, and its finished shards.

A shard counts when it is listed here, and the manifest is replaced as a whole, so that a reader or a rerun
never meets half a step. Files that it does not list are left by a killed run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from clipgraft.errors import DataError
from clipgraft.files import inside, write_json
from clipgraft.records import Whole, read_json, shown

MANIFEST = "manifest.json"
FORMAT = 1
Kind = Literal["images", "texts"]
Dtype = Literal["float16", "float32"]
VECTORS: Mapping[str, str] = {"images": "img_emb", "texts": "text_emb"}
METADATA, ERRORS = "metadata", "errors"
WORK, INDEX_FOLDER, ERRORS_FILE = ".work", "index", "errors.parquet"
COPIES = {"parquet": "vectors.parquet", "lance": "vectors.lance"}
"""What copies of the vectors beside them are called, by their form."""
_TAKEN = {*VECTORS.values(), METADATA, ERRORS, WORK, INDEX_FOLDER, ERRORS_FILE, MANIFEST, ".lock"}
_TAKEN |= set(COPIES.values())
_LONGEST = 1 << 20
_ADVICE = "encode into another folder"


@dataclass(frozen=True)
class Origin:
    """Everything that determines vectors besides the items: base, preprocessing and number types.

    Attributes:
        kind: what was encoded.
        name, pretrained, fingerprint: of the base.
        preprocessing: digest of every step from the file to the model's input; empty where it cannot be told.
        compute: what type the model computed in.
        dtype: what type the vectors are kept in.
    """

    kind: Kind
    name: str
    pretrained: str
    fingerprint: str
    preprocessing: str
    compute: str
    dtype: Dtype

    @property
    def base(self) -> str:
        """The base, as messages name it."""
        named = " / ".join(part for part in (self.name, self.pretrained) if part) or "unnamed"
        return f"{named} ({self.fingerprint})"

    @property
    def tower(self) -> Literal["vision", "text"]:
        """The tower that made the vectors."""
        return "vision" if self.kind == "images" else "text"


@dataclass(frozen=True)
class VectorSet:
    """One folder of vectors. `digest` tells what an adapter did to them: None for the base's own."""

    folder: str
    adapter: str | None
    digest: str | None


@dataclass(frozen=True)
class AdapterNote:
    """An adapter that was given for a folder: its name, where it was read, and its digest by tower."""

    name: str
    path: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """A finished shard, the same rows in every set.

    Attributes:
        number: in the names of its files; never used twice.
        rows: with vectors.
        errors: items that could not be used.
        key: digest of its items: names, sizes, times and captions.
        files: size in bytes and SHA-256 of each file, by path below the folder.
    """

    number: Whole
    rows: Whole
    errors: Whole
    key: str
    files: Mapping[str, tuple[Whole, str]]


@dataclass(frozen=True)
class RecallNote:
    """What an approximation loses for one set of vectors.

    Attributes:
        folder: of the set.
        table: the pairs that it was measured on, and how many captions they have.
        points: percentage points that the worst recall lost.
        limit: points that it was allowed to lose.
        reference, approximate: recall without and with the approximation, shares by name.
    """

    folder: str
    table: str
    captions: Whole
    points: float
    limit: float
    reference: Mapping[str, float]
    approximate: Mapping[str, float]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        origin: what decides the values of vectors.
        source, root: where items were last read (`items.ItemSource`).
        sets: the folders of vectors.
        adapters: those that were named for this folder.
        kernels: which attention kernels computed the vectors.
        dim: of a vector, None before the first.
        next: number of the next shard.
        shards: finished ones.
        recall: of vectors that were computed in int8, what that loses.
    """

    origin: Origin
    source: str
    root: str
    sets: tuple[VectorSet, ...]
    adapters: tuple[AdapterNote, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    dim: int | None = None
    next: int = 0
    shards: tuple[Shard, ...] = ()
    recall: tuple[RecallNote, ...] = ()

    @property
    def emb(self) -> str:
        """The kind of file that holds the vectors."""
        return VECTORS[self.origin.kind]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def errors(self) -> int:
        return sum(shard.errors for shard in self.shards)

    def swapped(self, old: Shard | None, new: Shard | None) -> Manifest:
        """Return the manifest with a shard added, removed or replaced."""
        shards = tuple(shard for shard in self.shards if shard is not old)
        return replace(self, shards=(*shards, new) if new else shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder."""
    origin, rest = asdict(manifest.origin), asdict(manifest)
    del rest["origin"]
    totals = {"rows": manifest.rows, "errors": manifest.errors}
    write_json(folder / MANIFEST, {"clipgraft_encoded": FORMAT, **origin, **totals, **rest})


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder, None where there is none.

    It may be a stranger's: every value is checked, and every name in it is one that a shard or set here can
    have, so that no other file is ever read, written or deleted for it.

    Raises:
        DataError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    known = read_json(path, _File, advice=_ADVICE)
    origin = Origin(**{name: getattr(known, name) for name in Origin.__dataclass_fields__})
    rest = {name: getattr(known, name) for name in Manifest.__dataclass_fields__ if name != "origin"}
    manifest = Manifest(origin, **rest)
    if fault := _fault(manifest):
        raise DataError(f"{path}: {fault}; {_ADVICE}")
    return manifest


@dataclass(frozen=True)
class _File(Origin):
    """The manifest as the file has it: the fields of `Origin` stand beside the others."""

    clipgraft_encoded: Literal[1]
    source: str
    root: str
    sets: tuple[VectorSet, ...]
    adapters: tuple[AdapterNote, ...]
    kernels: Mapping[str, str]
    dim: Whole | None
    next: Whole
    shards: tuple[Shard, ...]
    recall: tuple[RecallNote, ...] = ()


def _fault(manifest: Manifest) -> str | None:
    """Describe in a few words what `encode_folder` would not have written; None if all is well."""
    folders = [part.folder for part in manifest.sets]
    if not folders or len(set(folders)) < len(folders):
        return f"sets has {len(folders)} folders of vectors, {len(set(folders))} of them different"
    for place, folder in enumerate(folders):
        if folder and not is_set_folder(folder):
            return f"sets[{place}].folder is {shown(folder)}, which is no name of a folder of vectors"
    if manifest.rows and not manifest.dim:
        return f"dim is {manifest.dim}, and there are {manifest.rows} rows"
    if manifest.dim and manifest.dim > _LONGEST:
        return f"dim is {manifest.dim}, and no model gives vectors of more than {_LONGEST:,} numbers"
    numbers = set[int]()
    for place, shard in enumerate(manifest.shards):
        if shard.number in numbers or shard.number >= manifest.next:
            return f"shards[{place}].number is {shard.number}, which is taken, or not below next"
        numbers.add(shard.number)
        names = set(_names(manifest, shard))
        if strange := sorted(names ^ shard.files.keys()):
            wrong = f"has no {shown(strange[0])}" if strange[0] in names else f"names {shown(strange[0])}"
            return f"shards[{place}].files {wrong}"
    return None


def is_set_folder(name: str) -> bool:
    """Tell whether a set of vectors may have this folder name."""
    plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    return plain and name not in _TAKEN


def _names(manifest: Manifest, shard: Shard) -> Iterator[str]:
    """Yield the files of a shard."""
    for part in manifest.sets if shard.rows else ():
        yield from (set_path(part.folder, kind, shard.number) for kind in (manifest.emb, METADATA))
    if shard.errors:
        yield set_path("", ERRORS, shard.number)


def shard_file(folder: Path, part: str, kind: str, number: int) -> Path:
    """Return the path of a shard's file; raises DataError where a link leads out of the encoded folder."""
    return inside(folder, set_path(part, kind, number), folder / MANIFEST, _ADVICE)


def set_path(folder: str, kind: str, number: int) -> str:
    """Return a shard's file relative to the encoded folder: `img_emb/img_emb_0.npy`, `vi/metadata/…`."""
    suffix = "parquet" if kind in (METADATA, ERRORS) else "npy"
    return f"{folder}/{kind}/{kind}_{number}.{suffix}".lstrip("/")
