"""Open a table of images and captions, whatever kind of file or folder it is."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipgraft.data.columns import Columns, Keys, find_columns, guess_notes, missing_columns
from clipgraft.data.delimited import header_readings, is_token_file, read_delimited, read_tokens
from clipgraft.data.folders import find_captions_file, image_root, read_sidecars
from clipgraft.data.rows import BadRow, Rows, Table, make_row, text_lines
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import reading_parquet

DATASET_TYPES = ("auto", "csv", "tsv", "jsonl", "parquet", "folder")

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "csv",
    ".token": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_HEAD = 20  # JSON Lines rows that are looked at to learn which keys there are


def read_table(
    source: Path,
    *,
    dataset_type: str = "auto",
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
    numbers: bool = False,
) -> Table:
    """Open `source` and find its columns. The rows themselves are read when `Table.rows` is iterated.

    `image_key`, `caption_key` and `separator` are taken as given; where they are None, open_clip's defaults
    ("filepath", "title", tab) are tried first, then the usual names and separators, and `Table.notes` says
    which. With `numbers`, numbers in the caption column are text.

    Raises DataError when the source is missing, empty, of an unknown kind, or lacks a column; ConfigError for
    an unknown `dataset_type` or a separator of more than one character.
    """
    keys = Keys(image_key, caption_key)
    kind = _kind(source, dataset_type)
    if kind == "folder":
        return _read_folder(source, keys, separator)
    return _read_file(source, kind, keys, separator, numbers)


def read_headers(
    source: Path, dataset_type: str = "auto", separator: str | None = None
) -> dict[str | None, tuple[str, ...]]:
    """The column names of a file, before any is chosen: separator -> names as that separator splits them.

    JSON Lines and Parquet have one entry, under None. Raises as `read_table`.
    """
    kind = _kind(source, dataset_type)
    if kind == "jsonl":
        return {None: tuple(_jsonl_names(source))}
    if kind == "parquet":
        return {None: tuple(_parquet_names(source))}
    return dict(header_readings(source, separator).items())


def _kind(source: Path, dataset_type: str) -> str:
    if dataset_type not in DATASET_TYPES:
        raise ConfigError(f'--dataset-type "{dataset_type}" is not one of {", ".join(DATASET_TYPES)}')
    if not source.exists():
        raise DataError(f"{source}: not found{_nearest(source)}")
    if source.is_dir():
        if dataset_type not in ("auto", "folder"):
            raise DataError(
                f"{source}: is a folder, and --dataset-type is {dataset_type}; name a file, or use folder"
            )
        return "folder"
    if dataset_type == "folder":
        raise DataError(f"{source}: is a file, and --dataset-type is folder; name a folder, or use auto")
    if dataset_type != "auto":
        return dataset_type
    kind = _SUFFIXES.get(source.suffix.lower())
    if kind is None:
        known = " ".join(_SUFFIXES)
        raise DataError(
            f"{source}: cannot tell what it is from its name (known: {known}); give --dataset-type"
        )
    return kind


def _nearest(source: Path) -> str:
    if not source.parent.is_dir():
        return f"; there is no folder {source.parent} either"
    near = get_close_matches(source.name, [path.name for path in source.parent.iterdir()], n=1)
    return f'; did you mean "{near[0]}"?' if near else "; check the path"


def _read_file(source: Path, kind: str, keys: Keys, separator: str | None, numbers: bool = False) -> Table:
    if kind == "jsonl":
        return _read_jsonl(source, keys, numbers)
    if kind == "parquet":
        return _read_parquet(source, keys, numbers)
    if separator is None and keys == Keys() and is_token_file(source):
        return read_tokens(source)
    return read_delimited(source, keys, separator)


def _read_folder(source: Path, keys: Keys, separator: str | None) -> Table:
    captions, notes = find_captions_file(source)
    if captions is None:
        return read_sidecars(source)
    table = _read_file(captions, _SUFFIXES[captions.suffix.lower()], keys, separator)
    folder, moved = image_root(source, table)
    notes = (f"captions from {captions.name}", *notes, *moved, *table.notes)
    return replace(table, folder=folder, kind=f"folder, {table.kind}", notes=notes)


def _jsonl_names(source: Path) -> list[str]:
    with closing(_json_objects(source)) as objects:
        head = [value for _, value in islice(objects, _HEAD)]
    found = [value for value in head if isinstance(value, dict)]
    if not found:
        wrong = f"its first line {head[0]}" if head else "the file is empty"
        raise DataError(
            f'{source}: {wrong}; each line must be like {{"filepath": "a.jpg", "title": "a dog"}}'
        )
    return list(dict.fromkeys(name for value in found for name in value))


def _read_jsonl(source: Path, keys: Keys, numbers: bool) -> Table:
    names = _jsonl_names(source)
    columns = find_columns(names, keys)
    if columns is None:
        raise missing_columns(source, names, keys)
    return Table(
        source,
        source.parent,
        "jsonl",
        "line",
        partial(_jsonl_rows, source, columns, numbers),
        guess_notes(columns.guessed),
    )


def _jsonl_rows(source: Path, columns: Columns, numbers: bool) -> Rows:
    with closing(_json_objects(source)) as objects:
        for number, value in objects:
            if isinstance(value, str):
                yield BadRow(number, "", value)
            else:
                image, captions = value.get(columns.image), value.get(columns.caption)
                yield make_row(number, image, captions, numbers=numbers)


def _json_objects(source: Path) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """The object of every line that is not blank; instead of it, the reason why there is none."""
    with closing(text_lines(source)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"is not JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON that can be read: {error}"
            else:
                yield (
                    number,
                    value if isinstance(value, dict) else f"is a JSON {type(value).__name__}, not an object",
                )


def _parquet_names(source: Path) -> list[str]:
    with reading_parquet(source) as pyarrow:
        return list(pyarrow.parquet.read_schema(source).names)


def _read_parquet(source: Path, keys: Keys, numbers: bool) -> Table:
    names = _parquet_names(source)
    columns = find_columns(names, keys)
    if columns is None:
        raise missing_columns(source, names, keys)
    return Table(
        source,
        source.parent,
        "parquet",
        "row",
        partial(_parquet_rows, source, columns, numbers),
        guess_notes(columns.guessed),
    )


def _parquet_rows(source: Path, columns: Columns, numbers: bool) -> Rows:
    for number, (image, captions) in enumerate(_parquet_cells(source, [columns.image, columns.caption]), 1):
        yield make_row(number, image, captions, numbers=numbers)


def _parquet_cells(source: Path, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row."""
    done = 0
    with reading_parquet(source) as pyarrow, pyarrow.parquet.ParquetFile(source) as file:
        batches = file.iter_batches(columns=list(dict.fromkeys(names)))
        while True:
            with reading_parquet(source, f"damaged after row {done}"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
                # By place: of two columns of one name, the first.
                places = [batch.schema.names.index(name) for name in names]
                rows = list(zip(*(batch.column(place).to_pylist() for place in places), strict=True))
            yield from rows
            done += len(rows)
