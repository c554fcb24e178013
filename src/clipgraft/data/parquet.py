"""Read Parquet files; `python -m clipgraft.data.parquet FILE.parquet FOLDER` unpacks images.

The command takes images that are inside a Parquet file out of it: it writes them and `metadata.jsonl`, which
has all other columns of text and numbers, into a new folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.columnar import open_columnar
from clipgraft.data.table import Table, Wanted
from clipgraft.errors import ClipgraftError, DataError
from clipgraft.readers import reading_parquet
from clipgraft.stored_images import cell_bytes

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif"}


def open_parquet(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open a Parquet file with a column of image paths, or of images.

    Raises:
        DataError: it is damaged, or lacks a column.
    """
    return open_columnar([source], source, source.parent, "parquet", args, wanted, args.split)


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
    image = next((name for name, cell in first.items() if cell_bytes(cell) is not None), None)
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
            content = cell_bytes(row[image])
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
