"""Open a table of images and captions, whatever kind of file or folder it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipgraft.data.columns import Columns, Keys, find_columns, guess_notes, missing_columns
from clipgraft.data.delimited import header_readings, is_token_file, read_delimited, read_tokens
from clipgraft.data.folders import find_captions_file, read_sidecars
from clipgraft.data.foreign import is_tar_name, is_text, tar_advice, what_it_is
from clipgraft.data.json_tables import is_json_lines, json_rows
from clipgraft.data.rows import BadRow, Rows, Table, make_row
from clipgraft.data.table_options import TableOptions
from clipgraft.data.text_files import text_lines
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import POINTER, is_pointer, reading_parquet

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
    """`open_table` with the options that are given one by one."""
    return open_table(source, TableOptions(dataset_type, image_key, caption_key, separator, numbers=numbers))


def open_table(source: Path, options: TableOptions) -> Table:
    """Open `source` and find its columns. The rows themselves are read when `Table.rows` is iterated.

    Keys and separator are taken as given; where they are None, open_clip's defaults ("filepath", "title",
    tab) are tried first, then the usual names and separators, and `Table.notes` says which.

    Raises DataError when the source is missing, empty, of an unknown kind, or lacks a column; ConfigError for
    an unknown `dataset_type` or a separator of more than one character.
    """
    kind = _kind(source, options.dataset_type)
    table = _read_folder(source, options) if kind == "folder" else _read_file(source, kind, options)
    return table if options.image_root is None else replace(table, folder=options.image_root)


def read_headers(source: Path, options: TableOptions) -> dict[str | None, tuple[str, ...]]:
    """The column names of a file, before any is chosen: separator -> names as that separator splits them.

    JSON and Parquet have one entry, under None. Raises as `open_table`.
    """
    kind = _kind(source, options.dataset_type)
    if kind == "jsonl":
        return {None: tuple(_object_names(source, _json_objects(source, options)))}
    if kind == "json":
        return {None: tuple(_object_names(source, iter(json_rows(source))))}
    if kind == "parquet":
        return {None: tuple(_parquet_names(source))}
    return dict(header_readings(source, options).items())


def _kind(source: Path, dataset_type: str) -> str:
    if dataset_type not in DATASET_TYPES:
        raise ConfigError(f'--dataset-type "{dataset_type}" is not one of {", ".join(DATASET_TYPES)}')
    if is_tar_name(source.name):
        raise DataError(f"{source}: is {tar_advice(str(source))}")
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
    if is_pointer(source):
        raise DataError(f"{source}: {POINTER}")
    if source.suffix.lower() == ".json" and dataset_type in ("auto", "jsonl"):
        return "json" if not is_json_lines(source) else "jsonl"
    if dataset_type != "auto":
        return dataset_type
    kind = _SUFFIXES.get(source.suffix.lower())
    if kind is None:
        known = what_it_is(source)
        if known:
            raise DataError(f"{source}: is {known}")
        names = " ".join([*_SUFFIXES, ".json"])
        if not is_text(source):
            raise DataError(f"{source}: is no text, and no table that is read; those are {names}")
        advice = "if it is a text table, say so with --dataset-type csv, or jsonl for an object a line"
        raise DataError(f"{source}: cannot tell what it is from its name (known: {names}); {advice}")
    return kind


def _nearest(source: Path) -> str:
    if not source.parent.is_dir():
        return f"; there is no folder {source.parent} either"
    near = get_close_matches(source.name, [path.name for path in source.parent.iterdir()], n=1)
    return f'; did you mean "{near[0]}"?' if near else "; check the path"


def _read_file(source: Path, kind: str, options: TableOptions) -> Table:
    if kind == "json":
        return _read_objects(source, "json", "entry", options, partial(json_rows, source))
    if kind == "jsonl":
        return _read_objects(source, "jsonl", "line", options, partial(_json_objects, source, options))
    if kind == "parquet":
        return _read_parquet(source, options)
    chosen = (options.separator, options.image_key, options.caption_key)
    if chosen == (None, None, None) and is_token_file(source, options.encoding):
        return read_tokens(source, options)
    return read_delimited(source, options)


def _read_folder(source: Path, options: TableOptions) -> Table:
    captions, notes = find_captions_file(source)
    if captions is None:
        return read_sidecars(source, options)
    table = _read_file(captions, _SUFFIXES[captions.suffix.lower()], options)
    notes = (f"captions from {captions.name}", *notes, *table.notes)
    return replace(table, folder=source, kind=f"folder, {table.kind}", notes=notes)


def _object_names(source: Path, objects: Iterator[tuple[int, dict[str, Any] | str]]) -> list[str]:
    head = [value for _, value in islice(objects, _HEAD)]
    found = [value for value in head if isinstance(value, dict)]
    if not found:
        wrong = f"its first line {head[0]}" if head else "the file is empty"
        raise DataError(
            f'{source}: {wrong}; each line must be like {{"filepath": "a.jpg", "title": "a dog"}}'
        )
    return list(dict.fromkeys(name for value in found for name in value))


def _read_objects(
    source: Path,
    kind: str,
    unit: str,
    options: TableOptions,
    objects: Callable[[], Iterator[tuple[int, dict[str, Any] | str]]],
) -> Table:
    """A table of JSON objects."""
    names, keys = _object_names(source, objects()), Keys(options.image_key, options.caption_key)
    columns = find_columns(names, keys)
    if columns is None:
        raise missing_columns(source, names, keys)
    rows = partial(_object_rows, objects, columns, options)
    return Table(source, source.parent, kind, unit, rows, guess_notes(columns.guessed))


def _object_rows(
    objects: Callable[[], Iterator[tuple[int, dict[str, Any] | str]]], columns: Columns, options: TableOptions
) -> Rows:
    for number, value in objects():
        if isinstance(value, str):
            yield BadRow(number, "", value)
        else:
            captions = _flat([value.get(name) for name in columns.captions])
            yield make_row(number, value.get(columns.image), captions, options.cells)


def _flat(cells: list[Any]) -> Any:
    """The captions of several columns as one list; of one column as they are."""
    if len(cells) == 1:
        return cells[0]
    return [text for cell in cells for text in (cell if isinstance(cell, list | tuple) else [cell])]


def _json_objects(
    source: Path, options: TableOptions
) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """The object of every line that is not blank; instead of it, the reason why there is none."""
    with closing(text_lines(source, options.encoding)) as lines:
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


def _read_parquet(source: Path, options: TableOptions) -> Table:
    names, keys = _parquet_names(source), Keys(options.image_key, options.caption_key)
    columns = find_columns(names, keys)
    if columns is None:
        raise missing_columns(source, names, keys)
    _refuse_bytes(source, columns.image)
    rows = partial(_parquet_rows, source, columns, options)
    return Table(source, source.parent, "parquet", "row", rows, guess_notes(columns.guessed))


def _refuse_bytes(source: Path, column: str) -> None:
    """Raise DataError where a column holds images themselves, as Hugging Face's data sets do."""
    with reading_parquet(source) as pyarrow:
        kind = pyarrow.parquet.read_schema(source).field(column).type
        parts = {kind.field(i).name for i in range(kind.num_fields)} if pyarrow.types.is_struct(kind) else ()
        inside = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or "bytes" in parts
    if inside:
        folder = source.stem
        take_out = shlex.join(["python", "-m", "clipgraft.data.unpack", str(source), folder])
        raise DataError(
            f'{source}: the images are stored inside the file, as bytes in column "{column}"; take them out, '
            f"and name the folder: {take_out}"
        )


def _parquet_rows(source: Path, columns: Columns, options: TableOptions) -> Rows:
    cells = _parquet_cells(source, [columns.image, *columns.captions])
    for number, (image, *captions) in enumerate(cells, 1):
        yield make_row(number, image, _flat(captions), options.cells)


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
