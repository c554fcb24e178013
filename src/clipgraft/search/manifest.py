"""`manifest.json`: what an encoded folder holds, made by which base and adapters, and its finished shards.

A shard counts when it is listed here, and the manifest is replaced as a whole, so that a reader or a rerun
never meets half a step. Files that it does not list are left by a killed run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clipgraft.errors import DataError
from clipgraft.files import write_json

MANIFEST = "manifest.json"
FORMAT = 1
Kind = Literal["images", "texts"]
VECTORS: Mapping[str, str] = {"images": "img_emb", "texts": "text_emb"}
METADATA, ERRORS = "metadata", "errors"


@dataclass(frozen=True)
class Made:
    """What decides the values of vectors beside the items themselves.

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
    dtype: str

    @property
    def base(self) -> str:
        """The base for a message."""
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

    number: int
    rows: int
    errors: int
    key: str
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """All of it.

    Attributes:
        made: what decides the values of vectors.
        source, root: where items were last read (`items.Source`).
        sets: the folders of vectors.
        adapters: those that were named for this folder.
        kernels: which attention kernels computed the vectors.
        dim: of a vector, None before the first.
        next: number of the next shard.
        shards: finished ones.
    """

    made: Made
    source: str
    root: str
    sets: tuple[VectorSet, ...]
    adapters: tuple[AdapterNote, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    dim: int | None = None
    next: int = 0
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def errors(self) -> int:
        return sum(shard.errors for shard in self.shards)

    def swapped(self, old: Shard | None, new: Shard | None) -> Manifest:
        """One shard more, less, or for another."""
        shards = tuple(shard for shard in self.shards if shard is not old)
        return replace(self, shards=(*shards, new) if new else shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder."""
    made, rest = asdict(manifest.made), asdict(manifest)
    del rest["made"]
    totals = {"rows": manifest.rows, "errors": manifest.errors}
    write_json(folder / MANIFEST, {"clipgraft_encoded": FORMAT, **made, **totals, **rest})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where there is none.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return _parsed(known)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / MANIFEST} is not in the layout this version reads ({type(error).__name__}: {error}); "
            "encode into another folder"
        ) from error


def _parsed(known: dict[str, Any]) -> Manifest:
    if known["clipgraft_encoded"] != FORMAT:
        raise ValueError(f"format {known['clipgraft_encoded']}")
    shards = [
        Shard(**{**shard, "files": {name: (size, digest) for name, (size, digest) in shard["files"].items()}})
        for shard in known["shards"]
    ]
    return Manifest(
        Made(**{name: known[name] for name in Made.__dataclass_fields__}),
        known["source"],
        known["root"],
        tuple(VectorSet(**part) for part in known["sets"]),
        tuple(AdapterNote(**part) for part in known["adapters"]),
        known["kernels"],
        known["dim"],
        known["next"],
        tuple(shards),
    )


def set_path(folder: str, kind: str, number: int) -> str:
    """A shard's file of a set, below the encoded folder: `img_emb/img_emb_0.npy`, `vi/metadata/…`."""
    suffix = "parquet" if kind in (METADATA, ERRORS) else "npy"
    return f"{folder}/{kind}/{kind}_{number}.{suffix}".lstrip("/")
