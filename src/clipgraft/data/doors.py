"""Open a source of images with captions or labels, whatever kind of file or folder it is.

A kind of file is a `Door` in `DOORS`: a function, in a file of its own, that opens a path as a `Table` of
rows. Most doors let `choose_columns` find the wanted columns among the names that the file has. A folder has
a file of captions, a `name.txt` beside each image, or a folder for each class. Everything else (missing and
unreadable images, limits on bad rows, the summary) is the work of `clipgraft.data.reader`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from clipgraft.data import databases, spreadsheets
from clipgraft.data.addresses import as_address, fetched, refuse_loose_images
from clipgraft.data.args import TableArgs
from clipgraft.data.dataset_folders import data_files, is_saved, open_dataset
from clipgraft.data.delimited import open_delimited
from clipgraft.data.image_files import Listing, list_images
from clipgraft.data.json_tables import open_json
from clipgraft.data.parquet import open_parquet
from clipgraft.data.table import LABEL, PAIRS, SOURCE, BadRow, Cells, Row, Rows, Table, Wanted, make_row
from clipgraft.data.text_files import is_tar_name, is_text, tar_advice, text_lines, what_it_is
from clipgraft.data.webdataset import is_tar_pattern, open_tars
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import POINTER, is_pointer

CAPTIONS_FILES = (
    "metadata.jsonl",  # Hugging Face imagefolder
    "metadata.csv",
    "metadata.parquet",
    "captions.jsonl",
    "captions.csv",
    "captions.tsv",
    "captions.txt",  # Flickr8k
    "Flickr8k.token.txt",
    "results_20130124.token",  # Flickr30k
    "results.csv",  # Flickr30k of Kaggle
)
_SPECIAL = {
    "split": "is no table or data set with parts",
    "sheet": "is no spreadsheet",
    "query": "is no SQLite or DuckDB file",
}
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq", ".token"})
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})


@dataclass(frozen=True)
class Door:
    """A kind of file.

    Attributes:
        names: of `dataset_type` that open it whatever its suffix is.
        suffixes: of the files that it opens where the type is not named; in lower case.
        open: opens a file and finds the wanted columns. Raises DataError or ConfigError, in one line.
        takes: those of `split`, `sheet` and `query` that mean something to it.
    """

    names: tuple[str, ...]
    suffixes: tuple[str, ...]
    open: Callable[[Path, TableArgs, Wanted], Table]
    takes: tuple[str, ...] = ()


_TARS = Door(("webdataset",), (".tar",), open_tars)
_DATASETS = Door((), (), open_dataset, ("split",))
DOORS = (
    Door(("csv", "tsv"), (".csv", ".tsv", ".txt", ".token"), open_delimited, ("split",)),
    Door(("jsonl",), (".jsonl", ".ndjson", ".json"), open_json, ("split",)),
    Door(("parquet",), (".parquet", ".pq"), open_parquet, ("split",)),
    _TARS,
    Door(("spreadsheet",), spreadsheets.SUFFIXES, spreadsheets.open_spreadsheet, ("sheet",)),
    Door(("sql",), databases.SUFFIXES, databases.open_database, ("query",)),
)


def open_table(source: Path, args: TableArgs | None = None, wanted: Wanted = PAIRS) -> Table:
    """Open `source` and find its columns. The rows themselves are read when `Table.rows` is iterated.

    Keys and separator are taken as given; where they are None, open_clip's defaults ("filepath", "title",
    tab) are tried first, then the usual names and separators, and `Table.notes` says which.

    Raises:
        DataError: the source is missing, empty, of an unknown kind, or lacks a column.
        ConfigError: no such `image_root`, or a separator of more than one character.
    """
    args = args or TableArgs()
    if args.image_root is not None and not args.image_root.is_dir():
        raise ConfigError(f"`image_root` {args.image_root}: there is no such folder; check the path")
    address = None if is_tar_pattern(source) else as_address(source)
    if address is None:
        return _open_local(source, args, wanted)
    table = _open_local(fetched(address, args.split), args, wanted)
    loose = wanted.needs_image and wanted.image is not SOURCE and args.image_root is None
    if loose and not (table.inside or address.startswith("hf:")):
        raise refuse_loose_images(address)
    return replace(table, source=source)


def _open_local(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    door = _door_of(source, args.dataset_type)
    door = door or _folder_door(source)
    if wanted.image is SOURCE and (door is None or door is _TARS):
        raise DataError(f"{source}: is no table; name one of source texts and their translations")
    if door is not None:
        check_options(source, args, door)
        table = door.open(source, args, wanted)
    elif wanted.text is LABEL:
        check_options(source, args)
        return _open_class_folders(source)
    else:
        table = _open_folder(source, args, wanted)
    return table if args.image_root is None else replace(table, folder=args.image_root)


def check_options(source: str | Path, args: TableArgs, door: Door | None = None) -> None:
    """Raise ConfigError for an option that means nothing to a source."""
    for name, has in _SPECIAL.items():
        if getattr(args, name) is not None and (door is None or name not in door.takes):
            raise ConfigError(f"`{name}` given, but {source} {has}; leave it out")


def _door_of(source: Path, dataset_type: str) -> Door | None:
    """Return the door of a file, or None for a folder. Raises DataError where no door opens it."""
    if is_tar_pattern(source) or (dataset_type == "webdataset" and source.is_dir()):
        return _TARS
    if is_tar_name(source.name) and not source.is_dir():
        raise DataError(f"{source}: is {tar_advice(str(source))}")
    if not source.exists():
        raise DataError(f"{source}: not found{_nearest(source)}")
    if source.is_dir():
        if dataset_type not in ("auto", "folder"):
            raise DataError(
                f"{source}: is a folder, and `dataset_type` is {dataset_type}; name a file, or use folder"
            )
        return None
    if dataset_type == "folder":
        raise DataError(f"{source}: is a file, and `dataset_type` is folder; name a folder, or use auto")
    if is_pointer(source):
        raise DataError(f"{source}: {POINTER}")
    if dataset_type == "webdataset":
        raise DataError(f"{source}: is no tar file, and `dataset_type` is webdataset; use auto")
    named = (door for door in DOORS if dataset_type in door.names)
    door = next(named, None) or _by_suffix(source)
    if door is None:
        raise _unknown(source)
    return door


def _folder_door(folder: Path) -> Door | None:
    """Return the door of a folder that has a data set's files in it, and no images or captions files."""
    if any((folder / name).is_file() for name in CAPTIONS_FILES):
        return None
    if is_saved(folder):
        return _DATASETS
    found = data_files(folder)
    if not found or list_images(folder):
        return None
    return _TARS if any(path.suffix.lower() == ".tar" for path in found) else _DATASETS


def is_folder_of_data(folder: Path) -> bool:
    """Tell whether a folder has tar, Parquet or Arrow files in it, and no images of its own."""
    return _folder_door(folder) is not None


def _by_suffix(source: Path) -> Door | None:
    return next((door for door in DOORS if source.suffix.lower() in door.suffixes), None)


def _unknown(source: Path) -> DataError:
    known = what_it_is(source)
    if known:
        return DataError(f"{source}: is {known}")
    names = " ".join(suffix for door in DOORS for suffix in door.suffixes)
    if not is_text(source):
        return DataError(f"{source}: is no text, and no table that is read; those are {names}")
    advice = "if it is a text table, say so with `dataset_type='csv'`, or jsonl for an object a line"
    return DataError(f"{source}: cannot tell what it is from its name (known: {names}); {advice}")


def _nearest(source: Path) -> str:
    if not source.parent.is_dir():
        return f"; there is no folder {source.parent} either"
    near = get_close_matches(source.name, [path.name for path in source.parent.iterdir()], n=1)
    return f'; did you mean "{near[0]}"?' if near else "; check the path"


def _open_folder(folder: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open the captions file of a folder, or the text files beside its images."""
    there = [folder / name for name in CAPTIONS_FILES if (folder / name).is_file()]
    if not there:
        check_options(folder, args)
        return _open_sidecars(folder, args, wanted)
    captions, *others = there
    door = _by_suffix(captions)
    assert door is not None
    check_options(captions, args, door)
    table = door.open(captions, args, wanted)
    notes = [f"captions from {captions.name}"]
    if others:
        names = ", ".join(path.name for path in others)
        notes.append(f"not read: {names} (name a file instead of the folder to read it)")
    return replace(table, folder=folder, kind=f"folder, {table.kind}", notes=(*notes, *table.notes))


def _open_sidecars(folder: Path, args: TableArgs, wanted: Wanted) -> Table:
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


def _open_class_folders(folder: Path) -> Table:
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
