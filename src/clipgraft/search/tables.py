"""The Parquet tables of an encoded folder: metadata of rows, and items that could not be used.

Metadata of images: `path` (as `Item.key`), `bytes`, `mtime`, `width`, `height`, `caption`, `adapter`,
`base_fingerprint`; of texts the last three, `caption` being the text. A table of errors has `path`, `reason`,
`bytes` and `mtime`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import DataError
from clipgraft.files import atomic_path
from clipgraft.readers import read_parquet, reading
from clipgraft.search.plan import StoredRow

_ADVICE = "delete it, and run `clipgraft encode` again"
_TEXT, _TIME = "string", "timestamp[us, tz=UTC]"
_IMAGE_TYPES = {"path": _TEXT, "bytes": "int64", "mtime": _TIME, "width": "int32", "height": "int32"}
_TEXT_TYPES = {"caption": _TEXT, "adapter": _TEXT, "base_fingerprint": _TEXT}
_ERROR_TYPES = {"path": _TEXT, "reason": _TEXT, "bytes": "int64", "mtime": _TIME}
_LAST = 62_000_000_000_000_000  # microseconds from 1970 to the year 3934, and to 5 before our era
INSTALL = "pip install 'clipgraft[search]'"


@dataclass(frozen=True)
class MetaRow:
    """One row of metadata without what is the same in all; pixels, and microseconds since 1970."""

    key: str
    bytes: int | None = None
    mtime: int | None = None
    caption: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class ErrorRow:
    """An item that could not be used."""

    key: str
    reason: str
    bytes: int | None = None
    mtime: int | None = None


def need_pyarrow() -> Any:
    """The pyarrow module; raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"encoded folders need pyarrow: {INSTALL}") from error
    return pyarrow


def metadata_table(rows: Sequence[MetaRow], kind: str, adapter: str | None, fingerprint: str) -> Any:
    """A pyarrow table of the rows of one set."""
    pa = need_pyarrow()
    columns: dict[str, Any] = {}
    if kind == "images":
        columns["path"] = pa.array([row.key for row in rows], pa.string())
        columns["bytes"] = pa.array([row.bytes for row in rows], pa.int64())
        columns["mtime"] = pa.array([row.mtime for row in rows], pa.timestamp("us", "UTC"))
        columns["width"] = pa.array([row.width for row in rows], pa.int32())
        columns["height"] = pa.array([row.height for row in rows], pa.int32())
    columns["caption"] = pa.array([row.caption for row in rows], pa.string())
    columns["adapter"] = pa.array([adapter] * len(rows), pa.string())
    columns["base_fingerprint"] = pa.array([fingerprint] * len(rows), pa.string())
    return pa.table(columns)


def error_table(rows: Sequence[ErrorRow], parts: Sequence[Any] = ()) -> Any:
    """A pyarrow table of errors, after other such tables."""
    pa = need_pyarrow()
    columns = {
        "path": pa.array([row.key for row in rows], pa.string()),
        "reason": pa.array([row.reason for row in rows], pa.string()),
        "bytes": pa.array([row.bytes for row in rows], pa.int64()),
        "mtime": pa.array([row.mtime for row in rows], pa.timestamp("us", "UTC")),
    }
    return pa.concat_tables([*parts, pa.table(columns)]).combine_chunks()


def replace_captions(table: Any, captions: Sequence[str | None]) -> Any:
    """The same metadata with other captions."""
    pa = need_pyarrow()
    place = table.schema.get_field_index("caption")
    return table.set_column(place, "caption", pa.array(captions, pa.string()))


def write_table(path: Path, table: Any) -> None:
    """Write a table atomically; equal tables become equal bytes."""
    pa = need_pyarrow()
    with atomic_path(path) as temporary:
        pa.parquet.write_table(table, temporary)


def read_metadata(
    path: Path, kind: str, known: tuple[int, str], rows: int, columns: Sequence[str] | None = None
) -> Any:
    """The metadata of a shard, or some columns of it.

    `known` are the size and SHA-256 that the manifest has: what has changed since it was written is not given
    to pyarrow, which could take it for other captions.

    Raises:
        DataError: it is missing or damaged, or is not what `metadata_table` writes.
    """
    types = {**_IMAGE_TYPES, **_TEXT_TYPES}
    wanted = metadata_columns(kind) if columns is None else columns
    return _checked(path, known, rows, {name: types[name] for name in wanted})


def metadata_columns(kind: str) -> list[str]:
    """The names of the columns of metadata."""
    return [*(_IMAGE_TYPES if kind == "images" else {}), *_TEXT_TYPES]


def plain_rows(table: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of metadata as Python values; a time that Python has no date for is None."""
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


def read_errors(path: Path, known: tuple[int, str], rows: int) -> Any:
    """The errors of a shard likewise."""
    return _checked(path, known, rows, _ERROR_TYPES)


def _checked(path: Path, known: tuple[int, str], rows: int, types: Mapping[str, str]) -> Any:
    need_pyarrow()
    with reading(path, DataError, _ADVICE):
        content = path.read_bytes()
    if (len(content), hashlib.sha256(content).hexdigest()) != known:
        raise DataError(f"{path}: is damaged: its bytes are not those that the manifest lists; {_ADVICE}")
    table = read_parquet(content, path, list(types), _ADVICE)
    got = {field.name: str(field.type) for field in table.schema}
    if got != types or table.num_rows != rows:
        raise DataError(
            f"{path}: holds {table.num_rows} rows of {got}, and should hold {rows} of {types}; {_ADVICE}"
        )
    return table


def stored_rows(table: Any) -> Iterator[StoredRow]:
    """Metadata as rows to compare a source with."""
    pa = need_pyarrow()
    captions = table.column("caption").to_pylist()
    if "path" not in table.column_names:
        for row, text in enumerate(captions):
            yield StoredRow(row, text, None, None, text)
        return
    keys, sizes = table.column("path").to_pylist(), table.column("bytes").to_pylist()
    times = table.column("mtime").cast(pa.int64()).to_pylist()
    for row, (key, size, mtime, caption) in enumerate(zip(keys, sizes, times, captions, strict=True)):
        yield StoredRow(row, key, size, mtime, caption)


def stored_errors(table: Any) -> Iterator[StoredRow]:
    """A table of errors likewise, each as row -1."""
    pa = need_pyarrow()
    times = table.column("mtime").cast(pa.int64()).to_pylist()
    columns = [table.column(name).to_pylist() for name in ("path", "bytes", "reason")]
    for key, size, reason, mtime in zip(*columns, times, strict=True):
        yield StoredRow(-1, key, size, mtime, None, reason)


def content_key(metadata: Any, errors: Any) -> str:
    """Digest of a shard's items: their names, sizes, times, captions and faults, in order."""
    digest = hashlib.blake2b(digest_size=16)
    rows = [] if metadata is None else [stored_rows(metadata)]
    for row in itertools.chain(*rows, [] if errors is None else stored_errors(errors)):
        digest.update(repr((row.key, row.bytes, row.mtime, row.caption, row.reason)).encode())
    return digest.hexdigest()
