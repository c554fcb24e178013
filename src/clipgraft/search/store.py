"""The encoded folder on disk: Parquet tables, and shards that are written, committed, compacted and read.

Metadata of images: `path` (as `Item.key`), `bytes`, `mtime`, `width`, `height`, `caption`, `adapter`,
`base_fingerprint`; of texts the last three, `caption` being the text. A table of errors has `path`, `reason`,
`bytes` and `mtime`.

A step is: write a shard's files under a number that no file has, list it in the manifest, and remove the
files of the shard that it replaces. Whenever that is cut off, what the manifest lists is whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipgraft.errors import DataError
from clipgraft.files import atomic_path, inside, sweep_partial
from clipgraft.locks import LOCK, sole_owner
from clipgraft.readers import map_array, read_parquet, reading
from clipgraft.search.items import Item
from clipgraft.search.manifest import (
    ERRORS,
    ERRORS_FILE,
    MANIFEST,
    METADATA,
    WORK,
    Manifest,
    Shard,
    VectorSet,
    read_manifest,
    set_path,
    shard_file,
    write_manifest,
)
from clipgraft.search.plan import Kept

log = logging.getLogger("clipgraft")
_AGAIN = "delete it, and run `clipgraft encode` again"
_TEXT, _TIME = "string", "timestamp[us, tz=UTC]"
_IMAGE_TYPES = {"path": _TEXT, "bytes": "int64", "mtime": _TIME, "width": "int32", "height": "int32"}
_TEXT_TYPES = {"caption": _TEXT, "adapter": _TEXT, "base_fingerprint": _TEXT}
_ERROR_TYPES = {"path": _TEXT, "reason": _TEXT, "bytes": "int64", "mtime": _TIME}
_LAST = 62_000_000_000_000_000  # microseconds from 1970 to the year 3934, and to 5 before our era
INSTALL = "pip install 'clipgraft[search]'"
Array = npt.NDArray[Any]
Size = tuple[int | None, int | None]
"""Width and height in pixels; None of texts."""


def need_pyarrow() -> Any:
    """Import pyarrow; raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"encoded folders need pyarrow: {INSTALL}") from error
    return pyarrow


def metadata_table(
    rows: Sequence[Item], sizes: Sequence[Size], kind: str, adapter: str | None, fingerprint: str
) -> Any:
    """Make a pyarrow table of the rows of one set."""
    files: dict[str, Sequence[Any]] = {
        "path": [row.key for row in rows],
        "bytes": [row.bytes for row in rows],
        "mtime": [row.mtime for row in rows],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
    }
    texts: dict[str, Sequence[Any]] = {
        "caption": [row.caption for row in rows],
        "adapter": [adapter] * len(rows),
        "base_fingerprint": [fingerprint] * len(rows),
    }
    return _table({**files, **texts} if kind == "images" else texts)


def _error_table(rows: Sequence[Item]) -> Any:
    return _table(
        {
            "path": [row.key for row in rows],
            "reason": [row.reason for row in rows],
            "bytes": [row.bytes for row in rows],
            "mtime": [row.mtime for row in rows],
        }
    )


def _table(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Make a pyarrow table of columns that are of the types which their names have in every table."""
    pa = need_pyarrow()
    numbers = {"bytes": pa.int64(), "mtime": pa.timestamp("us", "UTC")}
    types = {**numbers, "width": pa.int32(), "height": pa.int32()}
    return pa.table(
        {name: pa.array(column, types.get(name, pa.string())) for name, column in columns.items()}
    )


def _write_table(path: Path, table: Any) -> None:
    """Write a table atomically; equal tables become equal bytes."""
    pa = need_pyarrow()
    with atomic_path(path) as temporary:
        pa.parquet.write_table(table, temporary)


def read_metadata(
    folder: Path, manifest: Manifest, part: VectorSet, shard: Shard, columns: Sequence[str] | None = None
) -> Any:
    """Read the metadata of a shard of a set with pyarrow, or some columns of them.

    Raises:
        DataError: the file is missing or damaged, or is not what `metadata_table` writes.
    """
    types = {**_IMAGE_TYPES, **_TEXT_TYPES}
    wanted = metadata_columns(manifest.origin.kind) if columns is None else columns
    path = shard_file(folder, part.folder, METADATA, shard.number)
    known = shard.files[set_path(part.folder, METADATA, shard.number)]
    return _read_table(path, known, shard.rows, {name: types[name] for name in wanted})


def metadata_columns(kind: str) -> list[str]:
    """Return the names of the columns of metadata."""
    return [*(_IMAGE_TYPES if kind == "images" else {}), *_TEXT_TYPES]


def plain_rows(table: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return some rows of metadata as Python values; a time outside Python's range is None."""
    pa = need_pyarrow()
    import pyarrow.compute as pc

    table = table.take(list(rows))
    if "mtime" in table.column_names:
        times = table.column("mtime")
        told = pc.less(pc.abs(times.cast(pa.int64())), _LAST)
        place = table.schema.get_field_index("mtime")
        table = table.set_column(place, "mtime", pc.if_else(told, times, None))
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def _read_table(path: Path, known: tuple[int, str], rows: int, types: Mapping[str, str]) -> Any:
    """Read a table of a shard.

    `known` are the size and SHA-256 that the manifest has: what has changed since it was written is not given
    to pyarrow, which could take it for other captions.
    """
    need_pyarrow()
    with reading(path, DataError, _AGAIN):
        content = path.read_bytes()
    if (len(content), hashlib.sha256(content).hexdigest()) != known:
        raise DataError(f"{path}: is damaged: its bytes are not those that the manifest lists; {_AGAIN}")
    table = read_parquet(content, path, list(types), _AGAIN)
    got = {field.name: str(field.type) for field in table.schema}
    if got != types or table.num_rows != rows:
        raise DataError(
            f"{path}: holds {table.num_rows} rows of {got}, and should hold {rows} of {types}; {_AGAIN}"
        )
    return table


def _stored_rows(table: Any) -> Iterator[tuple[int, Item]]:
    """Yield metadata as items to compare a source with, by their rows."""
    pa = need_pyarrow()
    captions = table.column("caption").to_pylist()
    if "path" not in table.column_names:
        for row, text in enumerate(captions):
            yield row, Item(text, caption=text)
        return
    keys, sizes = table.column("path").to_pylist(), table.column("bytes").to_pylist()
    times = table.column("mtime").cast(pa.int64()).to_pylist()
    for row, (key, size, mtime, caption) in enumerate(zip(keys, sizes, times, captions, strict=True)):
        yield row, Item(key, size, mtime, caption)


def _stored_errors(table: Any) -> Iterator[tuple[int, Item]]:
    """Yield a table of errors as such items, each with row -1."""
    pa = need_pyarrow()
    times = table.column("mtime").cast(pa.int64()).to_pylist()
    columns = [table.column(name).to_pylist() for name in ("path", "bytes", "reason")]
    for key, size, reason, mtime in zip(*columns, times, strict=True):
        yield -1, Item(key, size, mtime, reason=reason)


def _content_key(metadata: Any, errors: Any) -> str:
    """Hash a shard's items: their names, sizes, times, captions and faults, in order."""
    digest = hashlib.blake2b(digest_size=16)
    rows = () if metadata is None else _stored_rows(metadata)
    for _, item in itertools.chain(rows, () if errors is None else _stored_errors(errors)):
        digest.update(repr((item.key, item.bytes, item.mtime, item.caption, item.reason)).encode())
    return digest.hexdigest()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Create an encoded folder and lock it against other writers; raises BusyError where one is at work."""
    with sole_owner(folder / LOCK, str(folder), "wait for it, or name another folder"):
        yield


@dataclass(frozen=True)
class NewShard:
    """The content of a new shard: N rows, their vectors (N, D) by set folder, and what cannot be used."""

    rows: Sequence[Item]
    sizes: Sequence[Size]
    vectors: Mapping[str, Array]
    errors: Sequence[Item]


class Store:
    """An encoded folder that is being written; the caller is its sole writer."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def begin(self) -> None:
        """Write the manifest, and remove files that killed runs left."""
        write_manifest(self.folder, self.manifest)
        sweep_partial(self.folder)
        listed = {name for shard in self.manifest.shards for name in shard.files}
        for name in self._numbered():
            if name not in listed:
                (self.folder / name).unlink()

    def drop_damaged(self) -> None:
        """Drop shards whose files are gone or of another size; their items are encoded again."""
        for shard in self.manifest.shards:
            places = {name: self._listed(name) for name in shard.files}
            wrong = [name for name, (size, _) in shard.files.items() if _size(places[name]) != size]
            if wrong:
                log.warning(
                    "%s: damaged or missing; the %d rows of shard %d are encoded again",
                    self.folder / wrong[0],
                    shard.rows,
                    shard.number,
                )
                self._commit(shard, None)

    def stored(self, shard: Shard, errors: bool = True) -> Iterator[tuple[int, Item]]:
        """Yield the rows of a finished shard and, with `errors`, the items that could not be used."""
        if shard.rows:
            yield from _stored_rows(read_metadata(self.folder, self.manifest, self.manifest.sets[0], shard))
        if shard.errors and errors:
            yield from _stored_errors(self._errors(shard))

    def add(self, rows: NewShard) -> None:
        """Write a new shard and list it."""
        origin, metadata = self.manifest.origin, {}
        for part in self.manifest.sets if rows.rows else ():
            metadata[part] = metadata_table(
                rows.rows, rows.sizes, origin.kind, part.adapter, origin.fingerprint
            )
            if self.manifest.dim is None:
                self.manifest = replace(self.manifest, dim=int(rows.vectors[part.folder].shape[1]))
        errors = _error_table(rows.errors) if rows.errors else None
        self._put(
            None, {part: (table, rows.vectors[part.folder]) for part, table in metadata.items()}, errors
        )

    def compact(self, shard: Shard, kept: Kept) -> None:
        """Replace a shard by one with fewer rows or other captions; vectors keep every bit."""
        pa, written, errors = need_pyarrow(), {}, None
        for part in self.manifest.sets if kept.rows else ():
            table = read_metadata(self.folder, self.manifest, part, shard).take(list(kept.rows))
            captions = pa.array(kept.captions, pa.string())
            table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
            vectors = read_vectors(self.folder, self.manifest, part, shard)
            written[part] = (table, vectors[list(kept.rows)])
        if kept.errors:
            table = self._errors(shard)
            errors = table.filter([path in kept.errors for path in table.column("path").to_pylist()])
        self._put(shard, written, errors)

    def finish(self) -> None:
        """Gather the items that could not be used in one table."""
        parts = [self._errors(shard) for shard in self.manifest.shards if shard.errors]
        table = need_pyarrow().concat_tables([*parts, _error_table(())]).combine_chunks()
        _write_table(self.folder / ERRORS_FILE, table)

    def _put(self, old: Shard | None, sets: Mapping[VectorSet, tuple[Any, Array]], errors: Any) -> None:
        """Write the tables and vectors of a new shard, and list it in the place of an old one."""
        number, paths = self.manifest.next, list[Path]()
        for part, (table, vectors) in sets.items():
            emb, meta = (
                shard_file(self.folder, part.folder, k, number) for k in (self.manifest.emb, METADATA)
            )
            with atomic_path(emb, vectors.nbytes) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
            _write_table(meta, table)
            paths += [emb, meta]
        if errors is not None:
            paths.append(shard_file(self.folder, "", ERRORS, number))
            _write_table(paths[-1], errors)
        metadata = next((table for table, _ in sets.values()), None)
        rows, unusable = (0 if table is None else table.num_rows for table in (metadata, errors))
        files = {path.relative_to(self.folder).as_posix(): size_and_digest(path) for path in paths}
        new = Shard(number, rows, unusable, _content_key(metadata, errors), files) if paths else None
        self._commit(old, new)

    def _commit(self, old: Shard | None, new: Shard | None) -> None:
        changed = self.manifest.swapped(old, new)
        self.manifest = replace(changed, next=changed.next + 1) if new else changed
        write_manifest(self.folder, self.manifest)
        for name in old.files if old else ():
            self._listed(name).unlink(missing_ok=True)

    def _listed(self, name: str) -> Path:
        """Return the path of a listed file; raises DataError where a link leads out of the folder."""
        return inside(self.folder, name, self.folder / MANIFEST)

    def _errors(self, shard: Shard) -> Any:
        path = shard_file(self.folder, "", ERRORS, shard.number)
        return _read_table(path, shard.files[set_path("", ERRORS, shard.number)], shard.errors, _ERROR_TYPES)

    def _numbered(self) -> Iterator[str]:
        """Yield every file on disk that is named like a file of a shard."""
        kinds = (self.manifest.emb, METADATA)
        places = [(part.folder, kind) for part in self.manifest.sets for kind in kinds]
        for folder, kind in [*places, ("", ERRORS)]:
            for path in shard_file(self.folder, folder, kind, 0).parent.glob(f"{kind}_*"):
                number = path.stem.removeprefix(f"{kind}_")
                name = path.relative_to(self.folder).as_posix()
                if not (number.isdecimal() and number.isascii()) or int(number) > self.manifest.next:
                    continue  # no run of ours has come so far
                if name == set_path(folder, kind, int(number)):
                    yield name


def open_folder(folder: Path) -> Manifest | None:
    """Read the manifest of a folder that is to be written to; None for a new one.

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


def read_vectors(folder: Path, manifest: Manifest, part: VectorSet, shard: Shard) -> Array:
    """Map a shard's vectors (rows, D) of a set; raises DataError where the file is missing or damaged."""
    advice = "run `clipgraft encode` again"
    path = shard_file(folder, part.folder, manifest.emb, shard.number)
    rows: Array = map_array(path, DataError, advice)
    origin = manifest.origin
    if rows.shape != (shard.rows, manifest.dim) or rows.dtype != origin.dtype:
        raise DataError(
            f"{path}: holds {rows.dtype} of shape {rows.shape}, and should hold {origin.dtype} of shape "
            f"{(shard.rows, manifest.dim)}; {advice}"
        )
    return rows


def as_tensor(array: Array) -> Tensor:
    """View fp16 or fp32 vectors as a tensor, which must not be written to; also those mapped for reading."""
    whole = np.ascontiguousarray(array)
    if whole.flags.writeable or not whole.size:
        return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
    # `from_numpy` warns of what cannot be written to.
    memory: Any = (ctypes.c_char * whole.nbytes).from_address(whole.ctypes.data)
    memory.array = whole  # the tensor keeps the buffer alive, and the buffer the array
    kind = torch.float32 if whole.dtype == np.float32 else torch.float16
    return torch.frombuffer(memory, dtype=kind).view(whole.shape)


def widened(vectors: Array) -> Array:
    """Return stored vectors as float32, through torch, which widens fp16 fifteen times as fast as numpy."""
    return vectors if vectors.dtype == np.float32 else as_tensor(vectors).float().numpy()


def size_and_digest(path: Path) -> tuple[int, str]:
    """Return the size of a file in bytes, and its SHA-256."""
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
