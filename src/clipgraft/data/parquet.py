"""Read Parquet files of paths; `python -m clipgraft.data.parquet FILE.parquet FOLDER` unpacks images.

The command takes images that are inside a Parquet file out of it: it writes them and `metadata.jsonl`, which
has all other columns of text and numbers, into a new folder.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.json_tables import flat
from clipgraft.data.table import Cells, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.errors import ClipgraftError, DataError
from clipgraft.readers import reading_parquet

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif"}


def open_parquet(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open a Parquet file with a column of image paths."""
    with reading_parquet(source) as pyarrow:
        names = tuple(pyarrow.parquet.read_schema(source).names)
    _, columns = choose_columns(source, [Header(names)], args, wanted)
    wanted_names = [names[columns.image], *(names[place] for place in columns.texts)]
    _refuse_bytes(source, wanted_names[0])
    rows = partial(_rows, source, wanted_names, wanted.cells(args))
    return Table(
        source,
        source.parent,
        "parquet",
        "row",
        rows,
        columns.notes,
        columns.has_texts,
        has_images=columns.has_images,
    )


def _refuse_bytes(source: Path, column: str) -> None:
    """Raise DataError where a column holds images themselves, as Hugging Face's data sets do."""
    with reading_parquet(source) as pyarrow:
        kind = pyarrow.parquet.read_schema(source).field(column).type
        parts = {kind.field(i).name for i in range(kind.num_fields)} if pyarrow.types.is_struct(kind) else ()
        inside = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or "bytes" in parts
    if inside:
        folder = source.stem
        take_out = shlex.join(["python", "-m", "clipgraft.data.parquet", str(source), folder])
        raise DataError(
            f'{source}: the images are stored inside the file, as bytes in column "{column}"; take them out, '
            f"and name the folder: {take_out}"
        )


def _rows(source: Path, names: list[str], cells_are: Cells) -> Rows:
    for number, (image, *texts) in enumerate(_cells(source, names), 1):
        yield make_row(number, image, flat(texts), cells_are)


def _cells(source: Path, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
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


def unpack(source: Path, out: Path) -> int:
    """Write the images of a Parquet file and their table to a new folder; returns how many there are.

    Names are numbers: those in the file are a stranger's, and may stand twice.

    Raises:
        DataError: the file has no column of images, or the folder exists.
    """
    rows = _records(source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: has no rows")
    image = next((name for name, cell in first.items() if _content(cell) is not None), None)
    if image is None:
        raise DataError(f"{source}: no column of it holds images; it has {', '.join(first)}")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be made ({error.strerror}); name a folder that is not there"
        ) from error
    count = 0
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for number, row in enumerate(chain([first], rows)):
            content = _content(row[image])
            if content is None:
                continue
            name = f"{number:08d}{_suffix(content)}"
            (out / name).write_bytes(content)
            others = {key: cell for key, cell in row.items() if key != image and _is_json(cell)}
            table.write(json.dumps({**others, "file_name": name}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _records(source: Path) -> Iterator[dict[str, Any]]:
    with reading_parquet(source) as pyarrow, pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _content(cell: Any) -> bytes | None:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _suffix(content: bytes) -> str:
    if content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), ".jpg")


def _is_json(cell: Any) -> bool:
    cells = cell if isinstance(cell, list) else [cell]
    return all(part is None or isinstance(part, str | int | float) for part in cells)


def main(arguments: Sequence[str]) -> int:
    """Unpack, say what was written, and return the exit code."""
    if len(arguments) != 2:
        print("usage: python -m clipgraft.data.parquet FILE.parquet FOLDER", file=sys.stderr)
        return 2
    try:
        count = unpack(Path(arguments[0]), Path(arguments[1]))
    except ClipgraftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{arguments[1]}: {count:,} images, and metadata.jsonl with the other columns")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
