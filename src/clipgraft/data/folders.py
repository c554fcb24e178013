"""A folder of images whose captions are in one file inside it, or in a `name.txt` beside each image."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from clipgraft.data.listing import Listing, list_images
from clipgraft.data.rows import BadRow, Rows, Table, make_row
from clipgraft.data.table_options import TableOptions
from clipgraft.data.text_files import text_lines
from clipgraft.errors import DataError
from clipgraft.readers import is_pointer

CAPTIONS_FILES = (
    "metadata.jsonl",  # Hugging Face imagefolder
    "metadata.csv",
    "metadata.parquet",
    "captions.jsonl",
    "captions.csv",
    "captions.tsv",
    "captions.txt",  # Flickr8k
    "Flickr8k.token.txt",
    "results.csv",  # Flickr30k
)

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq", ".token"})


def find_captions_file(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The captions file of a folder, and a note when there was more than one to choose from."""
    there = [folder / name for name in CAPTIONS_FILES if (folder / name).is_file()]
    if not there:
        return None, ()
    others = ", ".join(path.name for path in there[1:])
    return there[0], (f"not read: {others} (name a file instead of the folder to read it)",) if others else ()


def read_sidecars(folder: Path, options: TableOptions) -> Table:
    """Open a folder in which `name.txt` holds the captions of `name.jpg`, one a line.

    Raises DataError when there is no image, or no image has such a file.
    """
    listing = Listing()
    images = list_images(folder, listing)
    if not images:
        raise DataError(
            f"{folder}: no images in this folder ({'; '.join(listing.notes())}); name a folder of images, or "
            "a table of their paths"
        )
    if not any(sidecar(image) for image in images):
        names = ", ".join(CAPTIONS_FILES)
        advice = f"{_other_tables(folder)}add one of {names}, or a NAME.txt beside each image"
        raise DataError(f"{folder}: {len(images):,} images and no captions; {advice}")
    rows = partial(_sidecar_rows, folder, images, options)
    return Table(folder, folder, "folder, NAME.txt beside each image", "image", rows, listing.notes())


def sidecar(image: Path) -> Path | None:
    """The text file of an image: `x.jpg.txt`, or `x.txt`, which other images of that name share."""
    for path in (image.with_name(f"{image.name}.txt"), image.with_suffix(".txt")):
        if path.is_file():
            return path
    return None


def _other_tables(folder: Path) -> str:
    """Tables in a folder and beside it that nobody named: what a person with captions probably means."""
    places = (folder, Path(os.path.abspath(folder)).parent)  # noqa: PTH100 - `..` of a link is meant as typed
    there = [
        path
        for place in places
        for path in sorted(place.iterdir())
        if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()
    ]
    return f"name the table with them ({', '.join(map(str, there[:3]))}), or " if there else ""


def _sidecar_rows(folder: Path, images: list[Path], options: TableOptions) -> Rows:
    for number, image in enumerate(images, 1):
        name = str(image.relative_to(folder))
        text = sidecar(image)
        if text is None:
            yield BadRow(number, name, "no text file beside it")
            continue
        try:
            captions = [line for line in text_lines(text, options.encoding) if line.strip()]
        except DataError as error:
            kind = "git-lfs pointer" if is_pointer(text) else "cannot be read"
            yield BadRow(number, name, str(error), f"its text file: {kind}")
        else:
            yield make_row(number, name, captions or None, options.cells)
