"""Read Parquet and Arrow files, one or the several of a Hugging Face data set, with paths or images in them.

An image in a cell, `{bytes, path}` or bytes alone, is named by its place (`clipgraft.stored_images`). Classes
stored as numbers get the names that `datasets` keeps beside the columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.img2dataset import STATUS, Downloads, is_record
from clipgraft.data.json_tables import flat
from clipgraft.data.parts import PART, Parts
from clipgraft.data.table import Cells, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import reading_parquet
from clipgraft.stored_images import GROUPS_KEPT, arrow_table, cell_path

_FIRST = 16  # cells that tell whether images are inside, or only named
_LARGE = 200  # rows of a group, all of which are decoded for one image


def open_columnar(
    files: Sequence[Path],
    source: Path,
    folder: Path,
    kind: str,
    args: TableArgs,
    wanted: Wanted,
    split: str | None = None,
) -> Table:
    """Open files of the same columns, at least one, as one table; their images are named below `folder`.

    With `split`, only rows are read whose column of that name has one of its values.

    Raises:
        DataError: a file is damaged, or they lack a column or differ in their columns.
        ConfigError: `image_root` is given, and the images are inside the files.
    """
    schemas = [_schema(file) for file in files]
    names = tuple(schemas[0].names)
    _, columns = choose_columns(source, [Header(names)], args, wanted)
    image, texts = names[columns.image], [names[place] for place in columns.texts]
    if split is not None and PART not in names:
        raise DataError(f"{source}: `split` given, but it has no column {PART!r}; leave it out")
    inside = columns.has_images and _holds_images(schemas[0].field(image).type)
    downloaded = inside and is_record(names)
    needed = (image, *texts, STATUS) if downloaded else (image, *texts)
    for file, schema in zip(files, schemas, strict=True):
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise DataError(f'{file}: has no column "{missing[0]}", which {files[0].name} has')
    if inside and args.image_root is not None:
        raise ConfigError(
            f'`image_root` given, but the images are inside {source}, in column "{image}"; leave it out'
        )
    notes = columns.notes
    if inside:
        kind, notes = f"{kind}, images inside", (*notes, *_slow(files))
    read = [] if inside and not columns.has_texts else texts
    named = _class_names(schemas[0], texts[0]) if wanted.cells(args).labels and texts else None
    found = _Read(folder, files, image, tuple(read), inside, named, downloaded)
    met: list[Downloads] = []
    of_split = None if split is None else partial(Parts, source, split)
    rows = partial(_rows, found, of_split, wanted.cells(args), met)
    return Table(
        source,
        folder,
        kind,
        "row",
        rows,
        notes,
        columns.has_texts,
        has_images=columns.has_images,
        inside=inside,
        met=lambda: tuple(note for downloads in met for note in downloads.notes()),
    )


@dataclass(frozen=True)
class _Read:
    """What is read of files.

    Attributes:
        folder: what names of images are relative to.
        image, texts: columns.
        inside: whether images are in their cells.
        classes: names of the numbers in the column of labels.
        downloaded: whether img2dataset wrote them, with rows of what did not come.
    """

    folder: Path
    files: Sequence[Path]
    image: str
    texts: tuple[str, ...]
    inside: bool
    classes: Sequence[str] | None
    downloaded: bool


def _rows(read: _Read, named: Callable[[], Parts] | None, cells: Cells, met: list[Downloads]) -> Rows:
    parts = None if named is None else named()
    met[:] = [downloads := Downloads()]
    columns = (*read.texts, *([PART] if parts else []), *([STATUS] if read.downloaded else []))
    number = 0
    for file in read.files:
        name = os.path.relpath(file, read.folder)
        for row, (path, *found) in enumerate(_cells(file, read.image, columns, read.inside)):
            number += 1
            if read.downloaded and not downloads.take(found.pop()):
                continue
            if parts and not parts.take(found.pop()):
                continue
            place = path if path is not None or not read.inside else cell_path(name, read.image, row)
            texts = [_class_name(read.classes, cell) for cell in found] if read.classes else found
            yield make_row(number, place, flat(texts) if texts else None, cells)
    if parts:
        parts.check()


def _class_name(classes: Sequence[str], cell: Any) -> Any:
    known = isinstance(cell, int) and not isinstance(cell, bool) and 0 <= cell < len(classes)
    if known:
        return classes[cell]
    return None if cell == -1 else cell  # `datasets` writes -1 where no class is known


def _schema(file: Path) -> Any:
    with reading_parquet(file) as pyarrow:
        is_arrow = file.suffix.lower() == ".arrow"
        schema = arrow_table(pyarrow, file).schema if is_arrow else pyarrow.parquet.read_schema(file)
        for field in schema:  # names are decoded only when they are asked for
            _ = field.name, [field.type.field(i).name for i in range(field.type.num_fields)]
        return schema


def _holds_images(kind: Any) -> bool:
    """Whether cells of a type are images themselves: bytes, or `{bytes, path}`."""
    parts = {kind.field(i).name for i in range(kind.num_fields)}
    return str(kind) in ("binary", "large_binary", "binary_view") or (
        str(kind).startswith("struct<") and "bytes" in parts
    )


def _slow(files: Sequence[Path]) -> tuple[str, ...]:
    """Say where reading in shuffled order decodes far more than it uses."""
    if any(file.suffix.lower() == ".arrow" for file in files):  # is mapped: no group is decoded
        return ()
    most, total = 0, sum(file.stat().st_size for file in files)
    for file in files:
        with reading_parquet(file) as pyarrow:
            # What it tells of the columns of a group ends the process where the file is damaged.
            meta = pyarrow.parquet.read_metadata(file)
            most = max(most, *(meta.row_group(index).num_rows for index in range(meta.num_row_groups)), 0)
    if total <= GROUPS_KEPT or most <= _LARGE:
        return ()
    return (
        f"images are stored in groups of up to {most:,}: a run whose image tower trains, and reads them "
        "shuffled, decodes a whole group for each; `python -m clipgraft.data.parquet` takes them out",
    )


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The names of a column of classes, as `datasets` keeps them; None where there are none."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _cells(file: Path, image: str, texts: Sequence[str], inside: bool) -> Iterator[tuple[Any, ...]]:
    """Yield (path, *texts) row by row; the path of an image inside is None."""
    done = 0
    names = [] if inside else [image]
    paths = _paths_instead(file, image) if inside else None
    with reading_parquet(file) as pyarrow:
        batches, close = _batches(pyarrow, file, list(dict.fromkeys([*names, *texts])))
    try:
        while True:
            with reading_parquet(file, f"damaged after row {done}"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
                # By place: of two columns of one name, the first.
                places = [batch.schema.names.index(name) for name in (*names, *texts)]
                columns = [batch.column(place).to_pylist() for place in places]
            rows = batch.num_rows
            if paths is not None and len(paths) < done + rows:
                raise DataError(
                    f"{file}: damaged after row {done} (its columns differ in length); write it again"
                )
            if inside:
                columns.insert(0, list(paths[done : done + rows]) if paths else [None] * rows)
            yield from zip(*columns, strict=True)
            done += rows
    finally:
        close()


def _batches(pyarrow: Any, file: Path, names: list[str]) -> tuple[Iterator[Any], Callable[[], None]]:
    if file.suffix.lower() == ".arrow":
        return iter(arrow_table(pyarrow, file).select(names).to_batches()), lambda: None
    opened = pyarrow.parquet.ParquetFile(file)
    return opened.iter_batches(columns=names), opened.close


def _paths_instead(file: Path, image: str) -> Sequence[str | None] | None:
    """The path in each cell that has no bytes; None where all cells have bytes, or it is not known."""
    paths: list[str | None] = []
    with reading_parquet(file) as pyarrow:
        if not (file.suffix.lower() == ".arrow" or _lacks_bytes(pyarrow, file, image)):
            return None
        batches, close = _batches(pyarrow, file, [image])
        for batch in batches:
            batch.validate(full=True)
            column = batch.column(0)
            if not str(column.type).startswith("struct<") or column.field("bytes").null_count == 0:
                paths += [None] * len(column)
                continue
            missing = column.field("bytes").is_null().to_pylist()
            named = column.field("path").to_pylist() if "path" in column.type.names else missing
            paths += [
                path if lost and isinstance(path, str) else None
                for path, lost in zip(named, missing, strict=True)
            ]
        close()
    return paths if any(paths) else None


def _lacks_bytes(pyarrow: Any, file: Path, image: str) -> bool:
    """Whether one of the first cells of a Parquet file has no bytes; only then are the others looked at."""
    with pyarrow.parquet.ParquetFile(file) as opened:
        batch = next(opened.iter_batches(batch_size=_FIRST, columns=[image]), None)
        if batch is None:
            return False
        batch.validate(full=True)
        column = batch.column(0)
        return str(column.type).startswith("struct<") and column.field("bytes").null_count > 0
