"""Open a path, pattern or address as a source of items."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from clipgraft.data.args import TableArgs
from clipgraft.data.doors import check_options, is_folder_of_data, open_table
from clipgraft.data.image_files import ImageFinder, Listing, Unlisted, walk_images
from clipgraft.data.table import IMAGES, TEXTS, Row, Table
from clipgraft.data.text_files import text_lines
from clipgraft.errors import DataError
from clipgraft.search.archives import is_archive_pattern, open_archives
from clipgraft.search.items import (
    Item,
    ItemSource,
    check_protocol,
    is_address,
    list_images_at,
    relative_key,
    storable,
    tidy,
)
from clipgraft.stored_images import image_bytes, image_state

_AUTO = TableArgs()
_NULLS = "captions that are none"


def open_images(source: str, options: TableArgs = _AUTO) -> ItemSource:
    """Open a source of images: a folder tree, a table with a column of image paths, or tar files.

    Args:
        source: a folder; a CSV, TSV, JSON Lines or Parquet file, whose paths are relative to it and may be
            addresses; a tar file, or a pattern of several (`a-{000..099}.tar`, `*.tar`), in WebDataset's
            layout; or the address of a folder or of tar files.
        options: for tables, which need no captions here.

    Raises:
        DataError: there is nothing of that name, or a table lacks a column.
    """
    if is_archive_pattern(source):
        check_options(source, options)
        return open_archives(source)
    if is_address(source):
        root = source.rstrip("/")
        if not root.partition("://")[2]:
            raise DataError(f"{source}: names no folder; write one, such as s3://bucket/images")
        check_protocol(root.partition("://")[0])
        check_options(source, options)
        return _address_source(root)
    path = Path(os.path.abspath(source))  # noqa: PTH100 - links stay as the user wrote them
    if path.is_dir() and not is_folder_of_data(path) and options.dataset_type in ("auto", "folder"):
        check_options(source, options)
        return _folder_source(path)
    return _table_source(path, open_table(path, options, IMAGES))


def open_texts(source: str, options: TableArgs = _AUTO) -> ItemSource:
    """Open a `.txt` file with a text per line, or a table with a column of texts. Equal texts are one item.

    Raises DataError where there is no such file, or it lacks the column.
    """
    path = Path(os.path.abspath(source))  # noqa: PTH100
    if path.suffix.lower() == ".txt" and options.dataset_type == "auto":
        if not path.is_file():
            raise DataError(f"{path}: not found; check the path")
        check_options(source, options)
        return ItemSource(str(path), "", True, partial(_lines, path, options.csv_encoding))
    if path.is_dir():
        raise DataError(f"{path}: is a folder; with `texts` name a text file or a table")
    table = open_table(path, options, TEXTS)
    met: Counter[str] = Counter()

    def items() -> Iterator[Item]:
        met.clear()
        return _table_texts(table, met)

    return ItemSource(str(path), "", True, items, table.notes, lambda: _row_notes(table, met))


def _table_source(path: Path, table: Table) -> ItemSource:
    """Make a source of a table of image paths."""
    met: Counter[str] = Counter()
    root = Path(os.path.abspath(table.folder))  # noqa: PTH100
    finders: list[ImageFinder] = []

    def items() -> Iterator[Item]:
        met.clear()
        finders[:] = [ImageFinder(root)]
        return _table_items(table, root, finders[0], met)

    def notes() -> tuple[str, ...]:
        return (*_row_notes(table, met), *(note for finder in finders for note in finder.notes()))

    return ItemSource(str(path), str(root), True, items, table.notes, notes)


def _row_notes(table: Table, met: Counter[str]) -> tuple[str, ...]:
    """Return one line whose numbers add up to the rows of a table, and one for captions that are nulls."""
    nulls = met[_NULLS]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in met.items() if kind != _NULLS and count)
    rows = f"{met.total() - nulls:,} {table.unit}s: {kinds}"
    return (rows, f"{nulls:,} captions are nan, None or the like: left out") if nulls else (rows,)


def _folder_source(root: Path) -> ItemSource:
    """Make a source of a folder tree, listed anew every time."""
    met: list[Listing] = []

    def items() -> Iterator[Item]:
        met[:] = [Listing()]
        for found in walk_images(root, met[0]):
            if isinstance(found, Unlisted):
                key = _printable(relative_key(found.path, root))
                yield Item(key, reason=f"the folder cannot be listed: {found.reason}", unlisted=True)
            else:
                yield _file(found, root)

    return ItemSource(str(root), str(root), False, items, met=lambda: met[0].notes() if met else ())


def _address_source(root: str) -> ItemSource:
    """Make a source of a folder at an address."""
    met: list[Listing] = []

    def items() -> Iterator[Item]:
        met[:] = [Listing()]
        yield from list_images_at(root, met[0])

    return ItemSource(root, root, False, items, met=lambda: met[0].notes() if met else ())


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


def _table_items(table: Table, root: Path, finder: ImageFinder, met: Counter[str]) -> Iterator[Item]:
    with closing(table.rows()) as rows:
        for row in rows:
            if not isinstance(row, Row):
                met[f"without use: {row.kind or row.reason}"] += 1
                where = row.image or f"{table.source.name}, {table.unit} {row.number}"
                yield Item(where, reason=f"{table.unit} {row.number}: {row.reason}")
                continue
            captions = [text for caption in row.texts if (text := tidy(caption))] if table.has_texts else []
            item = _named(root, finder, row.image, "\n".join(dict.fromkeys(captions)) or None)
            met["name an image" if item.reason is None else "whose image is not found"] += 1
            met[_NULLS] += row.nulls if table.has_texts else 0
            yield item


def _named(root: Path, finder: ImageFinder, text: str, caption: str | None) -> Item:
    """Make an item of the image that a table cell names."""
    if is_address(text):
        check_protocol(text.partition("://")[0])
        return Item(text, caption=caption)
    found = finder.find(text)
    if isinstance(found, str):
        return Item(text, caption=caption, reason=found)
    try:
        size, changed = image_bytes(found), image_state(str(found)).mtime_ns // 1000
    except (tarfile.TarError, DataError) as error:
        return Item(text, caption=caption, reason=str(error))
    except OSError as error:
        return Item(text, caption=caption, reason=error.strerror or str(error))
    return Item(relative_key(found, root), size, changed, caption)


def _lines(path: Path, encoding: str | None) -> Iterator[Item]:
    with closing(text_lines(path, encoding)) as lines:
        for line in lines:
            text = tidy(line)
            if text is not None:
                yield Item(text, caption=text)


def _table_texts(table: Table, met: Counter[str]) -> Iterator[Item]:
    with closing(table.rows()) as rows:
        for row in rows:
            texts = [text for caption in row.texts if (text := tidy(caption))] if isinstance(row, Row) else []
            met["with text" if texts else "without text"] += 1
            for text in texts:
                yield Item(text, caption=text)
