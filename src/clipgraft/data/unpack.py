"""`python -m clipgraft.data.unpack FILE.parquet FOLDER`: images that are inside a Parquet file, as files.

Writes the images and `metadata.jsonl`, which has all other columns of text and numbers, into a new folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError, DataError
from clipgraft.readers import reading_parquet

_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif"}


def unpack(source: Path, out: Path) -> int:
    """Write the images of a Parquet file and their table to a new folder; returns how many there are.

    Names are numbers: those in the file are a stranger's, and may stand twice.

    Raises:
        DataError: the file has no column of images, or the folder exists.
    """
    rows = _rows(source)
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
        for number, row in enumerate(_with(first, rows)):
            content = _content(row[image])
            if content is None:
                continue
            name = f"{number:08d}{_suffix(content)}"
            (out / name).write_bytes(content)
            others = {key: cell for key, cell in row.items() if key != image and _is_plain(cell)}
            table.write(json.dumps({**others, "file_name": name}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    with reading_parquet(source) as pyarrow, pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _with(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _content(cell: Any) -> bytes | None:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _suffix(content: bytes) -> str:
    if content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _SUFFIXES.items() if content.startswith(magic)), ".jpg")


def _is_plain(cell: Any) -> bool:
    cells = cell if isinstance(cell, list) else [cell]
    return all(part is None or isinstance(part, str | int | float) for part in cells)


def main(arguments: Sequence[str]) -> int:
    """Unpack, say what was written, and return the exit code."""
    if len(arguments) != 2:
        print("usage: python -m clipgraft.data.unpack FILE.parquet FOLDER", file=sys.stderr)
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
