"""What clipgraft made itself and may replace; anything else is left as it is unless the user says otherwise.

Each kind of output carries a record: a page its generator, a checkpoint or file of weights a key, a folder of
a model the file `clipgraft_model.json`, a file of metrics their names.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError
from clipgraft.files import is_partial, write_json

MARK = "clipgraft"
"""Key in the metadata of `.safetensors` files and in the dictionaries of `.pt` files."""
FOLDER_MARK = "clipgraft_model.json"
DEMO_MARK = "clipgraft_demo.json"

_HEAD = 65_536  # bytes in which a page or a file of metrics tells what it is
_PAGE = b'<meta name="generator" content="clipgraft'
_METRICS = (b'"image_to_text_R@1"', b'"mean_per_class_recall"')
_LONGEST_PICKLE = 1 << 26


def version_mark() -> str:
    """What a file says it was made by."""
    from clipgraft import __version__

    return __version__


def mark_folder(folder: Path, name: str = FOLDER_MARK, **facts: Any) -> None:
    """Write the record that makes a folder ours."""
    write_json(folder / name, {"made_by": MARK, "version": version_mark(), **facts})


def made_by_us(path: Path) -> bool:
    """Whether a file or folder bears our record; nothing of it is run, and little of it is read."""
    try:
        if path.is_dir():
            return _marked(path / FOLDER_MARK) or _marked(path / DEMO_MARK)
        if not path.is_file():
            return False
        if path.stat().st_size == 0:
            return True  # nothing is lost, as of what mktemp made
        if zipfile.is_zipfile(path):
            return _in_pickle(path)
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    if head.lstrip()[:1] == b"<":
        return _PAGE in head
    if head.lstrip()[:1] == b"{":
        return any(name in head for name in _METRICS)
    return _in_safetensors(path, head)


def refuse_foreign(
    path: Path,
    overwrite: bool = False,
    error: type[ClipgraftError] = ClipgraftError,
    told: str = "",
    ours: Callable[[Path], bool] = made_by_us,
) -> None:
    """Keep what is not ours from being replaced; an empty folder and a free place are nobody's.

    Args:
        path: where something is about to be written.
        overwrite: the user has said that what is there may go.
        error: what to raise.
        told: the flag that names the path, for the message.
        ours: whether what is there bears our record, of the kind that is about to be written.

    Raises:
        error: something is there that does not bear our record.
    """
    if overwrite or not os.path.lexists(path) or ours(path):
        return
    if path.is_dir() and all(is_partial(item) for item in path.iterdir()):
        return
    what = "folder" if path.is_dir() else "file"
    raise error(
        f"{told}{told and ' '}{path}: this {what} was not made by clipgraft and is left as it is; "
        "choose another path, or say `overwrite=True`"
    )


def _marked(record: Path) -> bool:
    if not record.is_file():
        return False
    with record.open("rb") as file:
        return f'"made_by": "{MARK}"'.encode() in file.read(_HEAD)


def _in_pickle(path: Path) -> bool:
    """Whether a torch checkpoint has our key, which stands in its pickle as plain text."""
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if item.filename.endswith("data.pkl") and item.file_size < _LONGEST_PICKLE:
                return MARK.encode() in archive.read(item)
    return False


def _in_safetensors(path: Path, head: bytes) -> bool:
    if path.suffix != ".safetensors" or len(head) < 8:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    if not 2 <= length < min(path.stat().st_size, _LONGEST_PICKLE):
        return False
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and MARK in metadata
