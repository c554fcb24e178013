"""The three files of an adapter folder: written as one, read as one, refused where they do not match.

`adapter_model.safetensors` and `adapter_config.json` are PEFT's; `clipgraft.json` is ours and holds the
digest of the weights it was written for. While a save is under way the new record lies beside the old one,
and the one that names the weights that are there is in force. So a save that is killed at any point leaves
the old adapter or the new one, never half of each.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgraft.adapters.checkpoint import as_weight
from clipgraft.errors import AdapterError
from clipgraft.files import atomic_path, write_json
from clipgraft.models.weights_file import UnreadableError, check_is_weights, read_weights
from clipgraft.ours import refuse_foreign
from clipgraft.readers import placeholder
from clipgraft.records import read_json
from clipgraft.writing import size_of, writing

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PICKLED_FILE = "adapter_model.bin"  # what PEFT wrote until 0.7
NATIVE_FILE = "clipgraft.json"
FILES = (WEIGHTS_FILE, PICKLED_FILE, CONFIG_FILE, NATIVE_FILE)
PENDING_FILE = ".clipgraft.json.next"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Contents:
    """What an adapter folder holds.

    Attributes:
        folder: where.
        tensors: by their PEFT names.
        config: `adapter_config.json`.
        record: `clipgraft.json`; None in folders that PEFT wrote.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    record: dict[str, Any] | None


def refuse_other(folder: Path, overwrite: bool = False) -> None:
    """Keep an adapter from being written into a folder with an adapter of PEFT's, or with anything else.

    Raises:
        AdapterError: the folder holds something, and no adapter of ours.
    """
    if folder.is_dir():
        refuse_foreign(folder, overwrite, AdapterError, ours=_bears_record)


def _bears_record(folder: Path) -> bool:
    # The record of a save comes before its weights, so that one which was killed has it too.
    for record in (folder / NATIVE_FILE, folder / PENDING_FILE):
        with contextlib.suppress(AdapterError, OSError):
            if record.is_file() and "weights_sha256" in _read_json(record):
                return True
    return False


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write an adapter folder, or replace the adapter in it.

    Raises:
        WriteError: the folder cannot be written.
    """
    with atomic_path(folder / WEIGHTS_FILE, size_of(tensors)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        digest = {"format": FORMAT_VERSION, "weights_sha256": _digest(temporary)}
        write_json(folder / PENDING_FILE, {**digest, **record, "adapter_config": dict(config)})
    write_json(folder / CONFIG_FILE, dict(config))
    with writing(folder / NATIVE_FILE):
        (folder / PENDING_FILE).replace(folder / NATIVE_FILE)


def read_folder(path: Path, name: str | None = None) -> Contents:
    """Read an adapter folder, or that of a run which holds one; `name` picks one of several in subfolders.

    Raises:
        AdapterError: no adapter there, or its files are damaged or do not belong together.
    """
    folder = find_folder(path, name)
    tensors, digest = _read_weights(folder)
    records = [name for name in (NATIVE_FILE, PENDING_FILE) if (folder / name).is_file()]
    for name in records:
        record = _read_json(folder / name)
        if record.get("weights_sha256") == digest:
            config = _read_json(folder / CONFIG_FILE)
            if name == PENDING_FILE and isinstance(record.get("adapter_config"), dict):
                config = record["adapter_config"]
            return Contents(folder, tensors, config, _current(record, folder / name))
    if NATIVE_FILE in records:
        raise AdapterError(
            f"{folder}: {WEIGHTS_FILE} is not the file {NATIVE_FILE} was written for: copy all files of the "
            "adapter together, or save it again"
        )
    return Contents(folder, tensors, _read_json(folder / CONFIG_FILE), None)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of an adapter and the digest of their file; PEFT takes safetensors first, as here."""
    weights = next(path for name in (WEIGHTS_FILE, PICKLED_FILE) if (path := folder / name).is_file())
    try:
        if weights.name == WEIGHTS_FILE:
            check_is_weights(weights)
            return load_file(weights), _digest(weights)
        state = read_weights(weights).state
        return {n: as_weight(t, n, weights, t.ndim) for n, t in state.items()}, _digest(weights)
    except UnreadableError as error:
        raise AdapterError(f"{weights} cannot be read: {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{weights} is truncated or damaged ({_brief(error)}): copy or save it again"
        ) from error


def find_folder(path: Path, name: str | None = None) -> Path:
    """The adapter folder at a path, which may be one of its files, a run folder, or one of named adapters.

    PEFT saves an adapter that is not named `default` in a subfolder of that name.

    Raises:
        AdapterError: there is none, or several and none of that name.
    """
    if path.is_file() and path.name in FILES:
        path = path.parent
    for folder in (path, path / "adapter"):
        if _holds_adapter(folder):
            return folder
    named = sorted(folder for folder in path.glob("*/") if _holds_adapter(folder))
    chosen = [folder for folder in named if folder.name == name]
    if chosen or len(named) == 1:
        return (chosen or named)[0]
    if named:
        listed = ", ".join(folder.name for folder in named[:8])
        raise AdapterError(f"{path} holds several adapters, {listed}: give the folder of one, {named[0]}")
    if not path.exists():
        raise AdapterError(f"no adapter at {path}: there is no such folder; check the path")
    weights = next((name for name in (WEIGHTS_FILE, PICKLED_FILE) if (path / name).is_file()), None)
    if weights is not None:
        lone = f"{path} holds {weights} without {CONFIG_FILE}"
        raise AdapterError(
            f"no adapter at {path}: {lone}; an adapter is a folder with {CONFIG_FILE} and its weights"
        )
    raise AdapterError(
        f"no adapter at {path}: an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE} in it"
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter folder, or a run folder that holds one."""
    try:
        find_folder(Path(path))
    except AdapterError:
        return False
    return True


def _holds_adapter(folder: Path) -> bool:
    weights = (folder / WEIGHTS_FILE).is_file() or (folder / PICKLED_FILE).is_file()
    return weights and (folder / CONFIG_FILE).is_file()


def _current(record: dict[str, Any], path: Path) -> dict[str, Any]:
    version = record.get("format")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format {version!r}, this clipgraft reads {FORMAT_VERSION}: update clipgraft, or "
            "save the adapter again"
        )
    return record


def _read_json(path: Path) -> dict[str, Any]:
    if problem := placeholder(path):
        raise AdapterError(f"{path} cannot be read: {problem}")
    return read_json(path, dict[str, Any], AdapterError, "copy or save the adapter again")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _brief(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:120]
