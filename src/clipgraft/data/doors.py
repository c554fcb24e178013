"""Open a source of images with captions or labels, whatever kind of file or folder it is.

A kind of file is a `Door` in `DOORS`: a function, in a file of its own, that opens a path as a `Table` of
rows. Most doors let `choose_columns` find the wanted columns among the names that the file has. Everything
else (missing and unreadable images, limits on bad rows, the summary) is the work of `clipgraft.data.reader`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from clipgraft.data.args import TableArgs
from clipgraft.data.columns import LABEL, PAIRS, Wanted
from clipgraft.data.delimited import open_delimited
from clipgraft.data.folders import find_captions_file, open_class_folders, open_sidecars
from clipgraft.data.json_tables import open_json
from clipgraft.data.parquet import open_parquet
from clipgraft.data.rows import Table
from clipgraft.data.text_files import is_tar_name, is_text, tar_advice, what_it_is
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import POINTER, is_pointer


@dataclass(frozen=True)
class Door:
    """A kind of file.

    Attributes:
        names: of `dataset_type` that open it whatever its suffix is.
        suffixes: of the files that it opens where the type is not named; in lower case.
        open: opens a file and finds the wanted columns. Raises DataError or ConfigError, in one line.
    """

    names: tuple[str, ...]
    suffixes: tuple[str, ...]
    open: Callable[[Path, TableArgs, Wanted], Table]


DOORS = (
    Door(("csv", "tsv"), (".csv", ".tsv", ".txt", ".token"), open_delimited),
    Door(("jsonl",), (".jsonl", ".ndjson", ".json"), open_json),
    Door(("parquet",), (".parquet", ".pq"), open_parquet),
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
    door = _door_of(source, args.dataset_type)
    if door is None and wanted.text is LABEL:
        return open_class_folders(source)
    table = door.open(source, args, wanted) if door else _open_folder(source, args, wanted)
    return table if args.image_root is None else replace(table, folder=args.image_root)


def _open_folder(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    captions, notes = find_captions_file(source)
    if captions is None:
        return open_sidecars(source, args, wanted)
    door = _by_suffix(captions)
    assert door is not None
    table = door.open(captions, args, wanted)
    notes = (f"captions from {captions.name}", *notes, *table.notes)
    return replace(table, folder=source, kind=f"folder, {table.kind}", notes=notes)


def _door_of(source: Path, dataset_type: str) -> Door | None:
    """Return the door of a file, or None for a folder. Raises DataError where no door opens it."""
    if is_tar_name(source.name):
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
    named = (door for door in DOORS if dataset_type in door.names)
    door = next(named, None) or _by_suffix(source)
    if door is None:
        raise _unknown(source)
    return door


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
