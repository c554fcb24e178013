"""Open a folder as Hugging Face's `datasets` saves one, or as the hub holds one: Arrow or Parquet files.

`save_to_disk` leaves `state.json` beside the Arrow files of one part, below `dataset_dict.json` where there
are several. On the hub a part is in its files' names, as in `data/train-00000-of-00002.parquet`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.columnar import open_columnar
from clipgraft.data.image_files import is_image_name
from clipgraft.data.parts import listed, unknown_part
from clipgraft.data.table import Table, Wanted
from clipgraft.errors import DataError
from clipgraft.records import read_json

STATE, PARTS, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"
_PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = re.compile(r"[a-z]+")
_OF = re.compile(r"(.+)-(\d{5})-of-(\d{5})\b")
_DEPTH = 2  # folders below, as in `en/data/train-00000-of-00001.parquet`


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets` saved a folder."""
    return (folder / PARTS).is_file() or all((folder / name).is_file() for name in (STATE, _INFO))


def data_files(folder: Path) -> list[Path]:
    """List the tar files in a folder, and Parquet files in it and just below, sorted; none beside images.

    Stops at the first image that it meets, so that a folder of images costs nothing.
    """
    found: list[Path] = []
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    name = entry.name.lower()
                    if name.startswith("."):
                        continue
                    if is_image_name(name):
                        return []
                    if name.endswith(".parquet") or (name.endswith(".tar") and not depth):
                        found.append(Path(entry.path))
                    elif depth < _DEPTH and entry.is_dir():
                        waiting.append((Path(entry.path), depth + 1))
        except OSError:  # what cannot be listed holds nothing that could be read
            continue
    return sorted(found)


def open_dataset(folder: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open the part of a data set that `split` names; its only one without.

    Raises:
        DataError: there are several parts and none is named, there is none of that name, or files are damaged
            or lack a column.
    """
    parts = _saved_parts(folder) if is_saved(folder) else parts_of(folder, data_files(folder))
    names = _chosen(folder, parts, args.split)
    files = [file for name in names for file in parts[name]]
    _refuse_gaps(files)
    kind = f"data set, {', '.join(filter(None, names)) or 'no parts'}, {len(files):,} files"
    return open_columnar(files, folder, folder, kind.replace(", 1 files", ", 1 file"), args, wanted)


def _refuse_gaps(files: list[Path]) -> None:
    """Raise DataError where some of `train-00000-of-00003` and on are not there."""
    groups: dict[tuple[Path, str, int], int] = {}
    for file in files:
        if match := _OF.match(file.name):
            key = (file.parent, match[1], int(match[3]))
            groups[key] = groups.get(key, 0) + 1
    for (place, name, total), count in groups.items():
        if count < total:
            raise DataError(f"{place}: has {count:,} of the {total:,} files of {name}; fetch the others too")


def part_of(name: str) -> str:
    """The part that a path on the hub names, by its last word that is one; "" for none."""
    words = _WORD.findall(name.lower())
    found = [part for word in words for part, spellings in _PARTS.items() if word in spellings]
    return found[-1] if found else ""


def parts_of(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Sort files into parts by their names."""
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(part_of(file.relative_to(folder).as_posix()), []).append(file)
    return parts


def known_part(split: str) -> str:
    """The usual name of a part: `val` is `validation`."""
    return next((part for part, spellings in _PARTS.items() if split.lower() in spellings), split)


def _chosen(folder: Path, parts: Mapping[str, list[Path]], split: str | None) -> list[str]:
    counts = {name: len(files) for name, files in parts.items()}
    if split is None:
        if len(parts) > 1:
            raise DataError(
                f"{folder}: has parts, which must not be mixed: {listed(counts, ' files')}; name one with "
                "`split` (of validation data: `val_split`)"
            )
        return list(parts)
    chosen = []
    for given in (part.strip() for part in split.split(",")):
        name = given if given in parts else known_part(given)
        if name not in parts:
            raise unknown_part(folder, given, counts, " files")
        chosen.append(name)
    return chosen


def _saved_parts(folder: Path) -> dict[str, list[Path]]:
    if (folder / STATE).is_file():
        return {"": _saved_files(folder)}
    record = read_json(folder / PARTS, dict[str, Any])
    names = record.get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_name(name) for name in names):
        raise DataError(f"{folder / PARTS}: names no parts; save the data set again")
    return {name: _saved_files(folder / name) for name in names}


def _saved_files(folder: Path) -> list[Path]:
    record = read_json(folder / STATE, dict[str, Any])
    listed = record.get("_data_files")
    found = listed if isinstance(listed, list) else []
    names = [str(file.get("filename", "")) for file in found if isinstance(file, dict)]
    if not names or not all(map(_is_name, names)):
        raise DataError(f"{folder / STATE}: names no data files; save the data set again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {missing[0]} is missing; copy the whole folder, or save it again")
    return [folder / name for name in names]


def _is_name(text: str) -> bool:
    """Whether a text out of a file names something right in its folder."""
    return text not in ("", ".", "..") and text.isprintable() and not re.search(r"[/\\:]|.{200}", text)
