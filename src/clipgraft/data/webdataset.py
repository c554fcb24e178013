"""Open tar files of WebDataset, or the folder that img2dataset wrote, as a table of images and captions.

An image is named by its path in the tar file (`clipgraft.stored_images`), where it is read in any order: so a
run shuffles, resumes to the same bits and keeps features as it does with image files. The captions of an
image are the lines of its `.txt` or `.caption`, and the texts under a usual key of its `.json`; labels are in
`.cls` or `.json`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from clipgraft.data.args import TableArgs
from clipgraft.data.img2dataset import Downloads
from clipgraft.data.table import LABEL, BadRow, Cells, Role, Row, Rows, Table, Wanted, make_row
from clipgraft.data.tar_samples import Met, Parse, TarImage, TarSamples, expand_braces
from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import placeholder, reason
from clipgraft.stored_images import TarMember, list_tar, member_path

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:")
_UNION = "::"  # open_clip's separator of several sources
_NONE = "empty"


def is_tar_pattern(source: Path) -> bool:
    """Tell whether a path names tar files that are not compressed: one, or several by braces or wildcards."""
    return source.name.lower().rstrip("}").endswith(".tar") and not source.is_dir()


def tars_in(folder: Path) -> list[Path]:
    """List the tar files right in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and path.is_file())


def open_tars(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open tar files, by a path, a pattern (`{000..099}.tar`, `*.tar`), several of them joined by `::`, or
    the folder that they are in.

    Raises:
        DataError: there are none, one is missing, or they are compressed or at an address.
        ConfigError: an option of tables of paths is given.
    """
    if args.image_root is not None:
        raise ConfigError("`image_root` given with tar files, whose images are inside them; leave it out")
    if args.csv_img_key is not None:
        raise ConfigError("`csv_img_key` given with tar files, which have no such column; leave it out")
    archives = find_tars(source)
    folder = _common_folder(archives)
    met: list[Met | Downloads] = []
    rows = partial(_rows, folder, archives, wanted, args, met)
    many = "1 tar file" if len(archives) == 1 else f"{len(archives):,} tar files"
    return Table(
        source,
        folder,
        f"webdataset, {many}",
        "image",
        rows,
        met=lambda: tuple(note for part in met for note in part.notes()),
    )


def find_tars(source: Path) -> list[Path]:
    """List the tar files that a path, pattern or folder names, in its order. Raises DataError for none."""
    if source.is_dir():
        found = tars_in(source)
        if not found:
            raise DataError(f"{source}: no tar files in this folder; name the folder that they are in")
        return found
    found = []
    for part in str(source).split(_UNION):
        if _ADDRESS.match(part):
            raise DataError(
                f"{part}: tar files at an address are not trained on from there, as images are read in any "
                "order; copy them to this machine first"
            )
        found += [path for name in expand_braces(part) for path in _matches(name)]
    return list(dict.fromkeys(found))


def _matches(name: str) -> list[Path]:
    if os.path.isfile(name):  # noqa: PTH113 - a name with brackets is no pattern where such a file is
        return [Path(name)]
    if not glob.has_magic(name):
        raise DataError(f"{name}: not found; check the path")
    found = sorted(glob.glob(name))  # noqa: PTH207
    if not found:
        raise DataError(
            f"{name}: no file matches; check the pattern, in quotes where a shell would expand it"
        )
    return [Path(path) for path in found]


def _common_folder(archives: Sequence[Path]) -> Path:
    """The folder that image names are relative to."""
    folders = {path.parent for path in archives}
    if len(folders) == 1:
        return folders.pop()
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))  # noqa: PTH100


def _rows(
    folder: Path, archives: Sequence[Path], wanted: Wanted, args: TableArgs, met: list[Met | Downloads]
) -> Rows:
    met[:] = [listed := Met(), downloads := Downloads()]
    parsers, cells, number = _parsers(wanted, args), wanted.cells(args), 0
    for archive in archives:
        name = os.path.relpath(archive, folder)
        found: dict[TarMember, list[str]] = {}
        try:
            with closing(_images(str(archive), name, parsers, listed)) as images:
                for image in images:
                    found.setdefault(image.member, []).extend(image.captions)
            wrong = ""
        except (tarfile.TarError, EOFError, OSError) as error:
            wrong = placeholder(archive) or f"the tar file is damaged or cut short ({reason(error)})"
        downloads.compare(archive, [member.name for member in found])
        for member, texts in found.items():
            number += 1
            yield _row(number, member_path(name, member.name, member.turn), texts, wanted, cells)
        if wrong:
            number += 1
            yield BadRow(number, name, f"{wrong}; copy or download it again", "damaged tar file")


def _row(number: int, image: str, texts: list[str], wanted: Wanted, cells: Cells) -> Row | BadRow:
    if texts or not wanted.needs_text:
        return make_row(number, image, texts, cells)
    texts_are = ".cls or .json with a label" if cells.labels else ".txt, .caption or .json with a caption"
    return BadRow(number, image, f"has no {texts_are} beside it", f"without {wanted.text.name}")


def _images(archive: str, name: str, parsers: dict[str, Parse], met: Met) -> Generator[TarImage, None, None]:
    """Yield the images of one tar file; one whose captions stand apart comes a second time with them."""
    with open(archive, "rb") as file:  # noqa: PTH123

        def read(member: TarMember) -> bytes:
            file.seek(member.offset)
            return file.read(member.size)

        yield from TarSamples(name, read, parsers, met).of(list_tar(archive))


def _parsers(wanted: Wanted, args: TableArgs) -> dict[str, Parse]:
    """Say which members are captions or labels, and how they are read."""
    key = wanted.keys(args)[1]
    in_json = partial(_in_json, wanted.text, key)
    if key is not None:
        return {".json": in_json}
    if wanted.cells(args).labels:
        return {".cls": _whole, ".json": in_json}
    return {".txt": _lines, ".caption": _lines, ".json": in_json}


def _lines(text: str) -> list[str] | str:
    """A caption a line, as in a folder of text files."""
    return [tidied for line in text.splitlines() if (tidied := " ".join(line.split()))] or _NONE


def _whole(text: str) -> list[str] | str:
    return [text.strip()] if text.strip() else _NONE


def _in_json(role: Role, key: str | None, text: str) -> list[str] | str:
    """The texts under the given key of an object, or under the first usual one that it has; "" for none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(value, dict):
        return ""
    names = (role.default, *role.usual) if key is None else (key,)
    found = next((value[name] for name in names if value.get(name) not in (None, "", [])), None)
    cells = found if isinstance(found, list) else [found]
    if role is LABEL:
        return [str(cell) for cell in cells if isinstance(cell, str | int) and not isinstance(cell, bool)]
    return _lines("\n".join(cell for cell in cells if isinstance(cell, str))) if found else ""
