"""Which kind of source a path, pattern or address is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from clipgraft.data.columns import Keys, caption_column, image_column, missing_columns
from clipgraft.data.listing import Listing, Unlisted, walk_images
from clipgraft.data.paths import find_image
from clipgraft.data.rows import Row, Table, text_lines
from clipgraft.data.tables import read_headers, read_table
from clipgraft.errors import DataError
from clipgraft.search.archives import is_archive_pattern, open_archives
from clipgraft.search.items import Item, Source, is_address, relative_key, storable, tidy
from clipgraft.search.remote import check_protocol, list_images_at


def open_images(
    source: str,
    *,
    dataset_type: str = "auto",
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
) -> Source:
    """A folder tree, a table with a column of image paths, tar files; trees and tars also at an address.

    Args:
        source: a folder; a CSV, TSV, JSON Lines or Parquet file, whose paths are relative to it and may be
            addresses; a tar file, or a pattern of several (`a-{000..099}.tar`, `*.tar`), in WebDataset's
            layout; or the address of a folder or of tar files.
        dataset_type, image_key, caption_key, separator: as in `read_pairs`, for tables. A table needs no
            captions here.

    Raises:
        DataError: there is nothing of that name, or a table lacks a column.
    """
    if is_archive_pattern(source):
        return open_archives(source)
    if is_address(source):
        root = source.rstrip("/")
        if not root.partition("://")[2]:
            raise DataError(f"{source}: names no folder; write one, such as s3://bucket/images")
        check_protocol(root.partition("://")[0])
        return _address_source(root)
    path = Path(os.path.abspath(source))  # noqa: PTH100 - links stay as the user wrote them
    if path.is_dir() and dataset_type in ("auto", "folder"):
        return _folder_source(path)
    table = _open_table(path, dataset_type, image_key, caption_key, separator)
    return Source(str(path), str(path.parent), True, partial(_table_items, *table), table[0].notes)


def open_texts(
    source: str, *, dataset_type: str = "auto", caption_key: str | None = None, separator: str | None = None
) -> Source:
    """A `.txt` file with a text a line, or a table with a column of texts. Equal texts are one.

    Raises DataError where there is no such file, or it lacks the column.
    """
    path = Path(os.path.abspath(source))  # noqa: PTH100
    if path.suffix.lower() == ".txt" and dataset_type == "auto":
        if not path.is_file():
            raise DataError(f"{path}: not found; check the path")
        return Source(str(path), "", True, partial(_lines, path))
    if path.is_dir():
        raise DataError(f"{path}: is a folder; with --texts name a text file or a table")
    readings = read_headers(path, dataset_type, separator)
    found = [
        (split, name) for split, names in readings.items() if (name := caption_column(names, caption_key))
    ]
    if not found:
        raise missing_columns(path, max(readings.values(), key=len), Keys(None, caption_key))
    split, column = found[0]
    image = image_column(readings[split]) or column
    table = read_table(
        path, dataset_type=dataset_type, image_key=image, caption_key=column, separator=split or separator
    )
    return Source(str(path), "", True, partial(_table_texts, table), table.notes)


def _folder_source(root: Path) -> Source:
    """A folder tree as a source, listed anew every time."""
    met: list[Listing] = []

    def items() -> Iterator[Item]:
        met[:] = [Listing()]
        for found in walk_images(root, met[0]):
            if isinstance(found, Unlisted):
                key = _printable(relative_key(found.path, root))
                yield Item(key, reason=f"the folder cannot be listed: {found.reason}", unlisted=True)
            else:
                yield _file(found, root)

    return Source(str(root), str(root), False, items, met=lambda: met[0].notes() if met else ())


def _address_source(root: str) -> Source:
    """A folder at an address as a source."""
    met: list[Listing] = []

    def items() -> Iterator[Item]:
        met[:] = [Listing()]
        yield from list_images_at(root, met[0])

    return Source(root, root, False, items, met=lambda: met[0].notes() if met else ())


def _file(entry: os.DirEntry[str], root: Path) -> Item:
    key = storable(relative_key(Path(entry.path), root))
    if key is None:
        name = _printable(relative_key(Path(entry.path), root))
        return Item(name, reason="the file name is not UTF-8; rename it")
    try:
        status = entry.stat()
    except OSError as error:
        return Item(key, reason=error.strerror or str(error))
    return Item(key, status.st_size, status.st_mtime_ns // 1000)


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _open_table(
    path: Path, dataset_type: str, image_key: str | None, caption_key: str | None, separator: str | None
) -> tuple[Table, bool]:
    """A table, and whether it has captions; the column of paths stands in for captions that are not there."""
    readings = read_headers(path, dataset_type, separator) if path.exists() else {}
    has_captions = any(caption_column(names, caption_key) for names in readings.values())
    split = separator
    if readings and not has_captions and caption_key is None:
        found = [(s, name) for s, names in readings.items() if (name := image_column(names, image_key))]
        if found:
            split, caption_key = found[0][0] or separator, found[0][1]
    table = read_table(
        path,
        dataset_type=dataset_type,
        image_key=image_key,
        caption_key=caption_key,
        separator=split,
    )
    return table, has_captions or table.kind == "Flickr token file"


def _table_items(table: Table, has_captions: bool) -> Iterator[Item]:
    root = Path(os.path.abspath(table.folder))  # noqa: PTH100
    with closing(table.rows()) as rows:
        for row in rows:
            if not isinstance(row, Row):
                where = row.image or f"{table.source.name}, {table.unit} {row.number}"
                yield Item(where, reason=f"{table.unit} {row.number}: {row.reason}")
                continue
            captions = [text for caption in row.captions if (text := tidy(caption))] if has_captions else []
            yield _named(root, row.image, "\n".join(dict.fromkeys(captions)) or None)


def _named(root: Path, text: str, caption: str | None) -> Item:
    """The image that a cell of a table names."""
    if is_address(text):
        check_protocol(text.partition("://")[0])
        return Item(text, caption=caption)
    found = find_image(root, text)
    if isinstance(found, str):
        return Item(text, caption=caption, reason=found)
    try:
        status = found.stat()
    except OSError as error:
        return Item(text, caption=caption, reason=error.strerror or str(error))
    return Item(relative_key(found, root), status.st_size, status.st_mtime_ns // 1000, caption)


def _lines(path: Path) -> Iterator[Item]:
    with closing(text_lines(path)) as lines:
        for line in lines:
            text = tidy(line)
            if text is not None:
                yield Item(text, caption=text)


def _table_texts(table: Table) -> Iterator[Item]:
    with closing(table.rows()) as rows:
        for row in rows:
            for caption in row.captions if isinstance(row, Row) else ():
                text = tidy(caption)
                if text is not None:
                    yield Item(text, caption=text)
