"""Folders of images: with a file of captions, a `name.txt` beside each image, or a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from clipgraft.data.args import TableArgs
from clipgraft.data.columns import Wanted
from clipgraft.data.image_files import Listing, list_images
from clipgraft.data.rows import BadRow, Cells, Row, Rows, Table, make_row
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
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq", ".token"})
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})


def find_captions_file(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Find the captions file of a folder, with a note where there was more than one."""
    there = [folder / name for name in CAPTIONS_FILES if (folder / name).is_file()]
    if not there:
        return None, ()
    others = ", ".join(path.name for path in there[1:])
    return there[0], (f"not read: {others} (name a file instead of the folder to read it)",) if others else ()


def open_sidecars(folder: Path, args: TableArgs, wanted: Wanted) -> Table:
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
    if not any(_sidecar(image) for image in images):
        names = ", ".join(CAPTIONS_FILES)
        advice = f"{_other_tables(folder)}add one of {names}, or a NAME.txt beside each image"
        raise DataError(f"{folder}: {len(images):,} images and no captions; {advice}")
    rows = partial(_sidecar_rows, folder, images, args.csv_encoding, wanted.cells(args))
    return Table(folder, folder, "folder, NAME.txt beside each image", "image", rows, listing.notes())


def _sidecar(image: Path) -> Path | None:
    """Find the text file of an image: `x.jpg.txt`, or `x.txt`, which other images of that name share."""
    for path in (image.with_name(f"{image.name}.txt"), image.with_suffix(".txt")):
        if path.is_file():
            return path
    return None


def _other_tables(folder: Path) -> str:
    """Name tables in a folder and beside it: one of them may be what the user meant."""
    places = (folder, Path(os.path.abspath(folder)).parent)  # noqa: PTH100 - `..` of a link is meant as typed
    there = [
        path
        for place in places
        for path in sorted(place.iterdir())
        if path.suffix.lower() in _TABLES and path.is_file()
    ]
    return f"name the table with them ({', '.join(map(str, there[:3]))}), or " if there else ""


def _sidecar_rows(folder: Path, images: list[Path], encoding: str | None, cells: Cells) -> Rows:
    for number, image in enumerate(images, 1):
        name = str(image.relative_to(folder))
        text = _sidecar(image)
        if text is None:
            yield BadRow(number, name, "no text file beside it")
            continue
        try:
            captions = [line for line in text_lines(text, encoding) if line.strip()]
        except DataError as error:
            kind = "git-lfs pointer" if is_pointer(text) else "cannot be read"
            yield BadRow(number, name, str(error), f"its text file: {kind}")
        else:
            yield make_row(number, name, captions or None, cells)


def open_class_folders(folder: Path) -> Table:
    """Open a folder whose sub-folders are classes; an image's is the one right below `folder`, at any depth.

    Raises:
        DataError: no sub-folder holds an image, or they are the parts of a data set.
    """
    listing = Listing()
    found = list_images(folder, listing)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    images: dict[str, list[Path]] = {path.name: [] for path in folders}
    loose = [path for path in found if path.parent == folder]
    for path in found:
        if path.parent != folder:
            images.setdefault(path.relative_to(folder).parts[0], []).append(path)
    if not any(images.values()):
        raise DataError(_no_class_folders(folder, len(folders), len(loose)))
    _refuse_splits(folder, folders)
    notes = (f"not used: images that lie beside the class folders ({len(loose):,})",) if loose else ()
    rows = partial(_class_rows, folder, images)
    notes = (*listing.notes(), *notes)
    return Table(folder, folder, "folder of class folders", "image", rows, notes, labels=tuple(images))


def _class_rows(folder: Path, images: dict[str, list[Path]]) -> Rows:
    labelled = ((path, name) for name, found in images.items() for path in found)
    for number, (path, name) in enumerate(labelled, 1):
        yield Row(number, str(path.relative_to(folder)), (name,))


def _no_class_folders(folder: Path, count: int, loose: int) -> str:
    layout = f"put the images of each class into a folder of its own, such as {folder / 'cat' / '1.jpg'}"
    if count:
        return f"{folder}: none of its {count:,} folders holds an image; {layout}"
    there = f"no class folders, only images ({loose:,})" if loose else "no class folders"
    return f"{folder}: {there}; {layout}, or name a table with a label column"


def _refuse_splits(folder: Path, folders: Sequence[Path]) -> None:
    """Raise DataError where the folders are parts of a data set: they would be learnt as classes."""
    names = [path.name for path in folders]
    if {name.casefold() for name in names} <= _SPLITS and all(
        any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()) for path in folders
    ):
        parts = ", ".join(names)
        raise DataError(f"{folder}: holds parts of a data set ({parts}), not classes; name {folders[0]}")
