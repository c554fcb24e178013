"""Open a folder of class folders, or a table with a label column, as rows of image and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from clipgraft.data.columns import guess_notes
from clipgraft.data.delimited import SEPARATOR
from clipgraft.data.listing import Listing, list_images
from clipgraft.data.rows import Row, Rows, Table
from clipgraft.data.table_options import TableOptions
from clipgraft.data.tables import open_table, read_headers
from clipgraft.errors import DataError

LABEL_FLAG = "--csv-label-key"
LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name", "target", "labels", "y")
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})


@dataclass(frozen=True)
class LabelTable:
    """A table whose `Row.captions` is the label, and the class folders that hold no image."""

    table: Table
    empty_classes: tuple[str, ...] = ()


def open_labels(source: Path, options: TableOptions) -> LabelTable:
    """Open `source`: a folder whose sub-folders are classes, or a table, whose `caption_key` is the label's.

    Raises:
        DataError: the source is missing, has no class folder with an image, or lacks a column.
        ConfigError: a separator of more than one character.
    """
    if source.is_dir():
        return _class_folders(source)
    key, separator = options.caption_key, options.separator
    readings = read_headers(source, options)
    split_by, label = _label_column(source, readings, key)
    table = open_table(source, replace(options, caption_key=label, separator=split_by or separator))
    guessed = [f'{LABEL_FLAG} "{label}"'] if key is None and label != LABEL_COLUMNS[0] else []
    if separator is None and split_by not in (None, SEPARATOR):
        guessed.append(f'--csv-separator "{split_by}"')
    return LabelTable(replace(table, notes=(*guess_notes(guessed), *table.notes)))


def _label_column(
    source: Path, readings: dict[str | None, tuple[str, ...]], key: str | None
) -> tuple[str | None, str]:
    """The separator and the name of the label column, the first of the usual names where none is given."""
    for separator, names in readings.items():
        folded = {name.casefold(): name for name in reversed(names)}
        found = [folded[name] for name in LABEL_COLUMNS if name in folded]
        if key is not None:
            found = [name for name in names if name == key]
        if found:
            return separator, found[0]
    raise _no_label_column(source, max(readings.values(), key=len), key)


def _no_label_column(source: Path, names: Sequence[str], key: str | None) -> DataError:
    wanted = LABEL_COLUMNS[0] if key is None else key
    there = ", ".join(f'"{name[:40]}"' for name in names[:12]) + (", ..." if len(names) > 12 else "")
    near = get_close_matches(wanted, names, n=1)
    advice = f'did you mean "{near[0]}"?' if near else f"name the column of the labels with {LABEL_FLAG}"
    return DataError(f'{source}: {LABEL_FLAG}: no column "{wanted}"; it has {there}; {advice}')


def _class_folders(folder: Path) -> LabelTable:
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
    empty = tuple(name for name, inside in images.items() if not inside)
    rows = partial(_folder_rows, folder, images)
    kind = "folder of class folders"
    return LabelTable(Table(folder, folder, kind, "image", rows, (*listing.notes(), *notes)), empty)


def _folder_rows(folder: Path, images: dict[str, list[Path]]) -> Rows:
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
    """A data set's parts would be learnt as its classes."""
    names = [path.name for path in folders]
    if {name.casefold() for name in names} <= _SPLITS and all(
        any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()) for path in folders
    ):
        parts = ", ".join(names)
        raise DataError(f"{folder}: holds parts of a data set ({parts}), not classes; name {folders[0]}")
