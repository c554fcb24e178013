"""Files of weights as they lie around: opened without running any code of theirs, to one flat dictionary.

Known are safetensors, `torch.save` files of plain values, and TorchScript archives, OpenAI's own among them,
whose tensors are read past their code. Training loops wrap weights in entries (`state_dict`,
`model_state_dict`) beside optimisers and averages; the model's own weights are taken and the rest is said.

`torch.jit.load` would run what a TorchScript archive says. It is a zip with the model's attributes pickled in
`data.pkl`, its bytes under `data/`, and programs under `code/`, which are not looked at here. The pickle is
read by an unpickler that knows tensors and plain containers; classes of the archive become bare records.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.models.library_calls import log_reading
from clipgraft.models.mapped_weights import OpenedFile, open_to_map
from clipgraft.readers import placeholder
from clipgraft.records import load_pt

# Where training loops keep the weights, the most telling first.
_ENTRIES = ("state_dict", "model_state_dict", "model", "module", "net", "clip", "weights", "params")
# Where they keep an average of them over steps.
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema")


_PICKLED = ("weights_only", "Weights only", "Unsupported global", "Unsupported class", "Unsupported operand")
# How TorchScript names types of storages and lists.
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_MOST_BYTES = 64 << 20  # of data.pkl, which holds names and shapes alone
_MOST_ATTRIBUTES, _LONGEST_PATH = 500_000, 2000


@dataclass(frozen=True)
class WeightsFile:
    """Weights by name.

    Attributes:
        path: the file.
        state: name to tensor, on the CPU.
        notes: what was chosen or left out, for the user.
        torchscript: whether it is an archive of a compiled model, as OpenAI's downloads are.
        opened: the files that tensors of `state` may stay in, mapped; empty where all must be copied.
    """

    path: Path
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    torchscript: bool = False
    opened: tuple[OpenedFile, ...] = ()


class UnreadableError(ValueError):
    """A file of weights that cannot be opened; the message says why and what to do."""


def read_weights(path: Path) -> WeightsFile:
    """Read a file of weights.

    Raises:
        UnreadableError: it is damaged, no file of weights, or needs code to be run.
    """
    check_is_weights(path)
    log_reading(path, path.stat().st_size)
    try:
        opened = open_to_map(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return WeightsFile(path, load_file(path), opened=_still_there(opened))
        if _is_torchscript(path):
            return WeightsFile(path, _read_archive(path), torchscript=True)
        state, notes = _model_entry(load_pt(path))
    except UnreadableError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise UnreadableError(_reason(error)) from error
    return WeightsFile(path, state, notes, opened=_still_there(opened))


def _still_there(opened: OpenedFile | None) -> tuple[OpenedFile, ...]:
    """What was opened before the tensors were mapped, if that is the file that they are in."""
    return (opened,) if opened is not None and opened.is_at_its_path else ()


def _read_archive(path: Path) -> dict[str, Tensor]:
    try:
        return read_torchscript(path)
    except Exception as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UnreadableError(
            f"it is a TorchScript archive whose weights cannot be found ({why}); fetch it again, or save the "
            "state_dict() of the model that it was compiled from"
        ) from error


def check_is_weights(path: Path) -> None:
    """Refuse what download tools leave in place of a file; raises UnreadableError that names it."""
    if problem := placeholder(path):
        raise UnreadableError(problem)


def _reason(error: Exception) -> str:
    """Why a file of weights cannot be opened, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check its permissions and disk"
    if "compressed archive" in text:
        return f"{text}; fetch it again"
    pickled = any(sign in text for sign in _PICKLED)
    advice = "save its state_dict() alone" if pickled else "copy or fetch it again"
    return f"it is damaged, no checkpoint of weights, or holds pickled code, which is never run; {advice}"


def _model_entry(data: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of the model itself in what a training loop saved."""
    notes: list[str] = []
    for _ in range(4):  # entries in entries; deeper ones are nobody's habit
        if not isinstance(data, Mapping) or not data or not all(isinstance(key, str) for key in data):
            break
        tensors = {name: value for name, value in data.items() if isinstance(value, Tensor)}
        inner = {name: value for name, value in data.items() if isinstance(value, Mapping) and value}
        chosen = next((name for name in (*_ENTRIES, *_AVERAGES) if name in inner), None)
        if len(tensors) > 8 or chosen is None:
            if not tensors:
                break
            if others := [name for name, value in data.items() if not isinstance(value, Tensor)]:
                notes.append(f"left out {len(others)} entries that are no weights: {_some(others)}")
            return tensors, tuple(notes)
        averages = [name for name in _AVERAGES if name in inner and name != chosen]
        if averages:
            notes.append(f"took {chosen!r}; the average beside it, {averages[0]!r}, is left out")
        elif chosen in _AVERAGES:
            notes.append(f"took {chosen!r}, the average over steps: it holds no other weights")
        data = inner[chosen]
    keys = f" under {_some([str(key) for key in data])}" if isinstance(data, Mapping) and data else ""
    raise UnreadableError(
        f"it is damaged or no checkpoint of weights: it holds no named weights{keys}; save the model's "
        "state_dict() to a file"
    )


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(_in_root(name) == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Its parameters, buffers and other tensors by their module paths; nothing of the archive runs.

    Raises:
        ValueError: the archive is damaged or holds something else than a module.
    """
    with zipfile.ZipFile(path) as archive:
        # torch compresses the code alone; bytes that unpack to more than the file holds are no weights.
        stored = [info for info in archive.infolist() if not _in_root(info.filename).startswith("code/")]
        if sum(info.file_size for info in stored) > path.stat().st_size:
            raise ValueError("its weights are compressed, as torch never writes them")
        root = next((n.partition("/")[0] for n in archive.namelist() if _in_root(n) == "data.pkl"), None)
        if root is None:
            raise ValueError("no data.pkl in the archive")
        if archive.getinfo(f"{root}/data.pkl").file_size > _MOST_BYTES:
            raise ValueError("data.pkl is larger than names and shapes are")
        module = _Reader(archive, root).load()
    tensors = _tensors(module)
    if not tensors:
        raise ValueError("the archive holds no weights")
    return tensors


def _in_root(name: str) -> str:
    """The part of a name below the one folder that an archive consists of."""
    return name.partition("/")[2]


class _Record:
    """An object of a class of the archive: its attributes, and none of its code."""

    attributes: dict[str, Any]

    def __new__(cls, *_: object) -> _Record:
        record = super().__new__(cls)
        record.attributes = {}
        return record

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.attributes |= {name: value for name, value in part.items() if isinstance(name, str)}


class _Reader(pickle.Unpickler):
    """Unpickles `data.pkl` with a fixed list of what may be called."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Record
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _view
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "torch.jit._pickle" and name in _LISTS:
            return list
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is called, which is not part of a model's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("the archive refers to something that is no stored tensor")
        if key not in self._storages:
            raw = self._archive.read(f"{self._root}/data/{key}")
            if len(raw) < count * dtype.itemsize or count < 0:
                raise ValueError(f"data/{key} is shorter than the archive says")
            stored = bytearray(raw[: count * dtype.itemsize])
            self._storages[key] = (
                torch.frombuffer(stored, dtype=dtype) if stored else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor over stored numbers, within their bounds."""
    whole = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or len(size) != len(stride):
        raise ValueError("a tensor of the archive has no storage or shape")
    if not all(isinstance(number, int) and number >= 0 for number in whole):
        raise ValueError("a tensor of the archive has a negative shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise ValueError("a tensor of the archive is larger than what is stored")
    return torch.as_strided(storage, size, stride, offset)


def _tensors(module: object) -> dict[str, Tensor]:
    """Tensors by path; a record that is reached on several paths has several names, within bounds."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, object]] = [("", module)]
    visited = 0
    while waiting:
        path, value = waiting.pop()
        for name, part in value.attributes.items() if isinstance(value, _Record) else ():
            visited += 1
            if visited > _MOST_ATTRIBUTES or len(path) > _LONGEST_PATH:
                raise ValueError("modules in modules without end")
            if isinstance(part, Tensor):
                found[f"{path}{name}"] = part
            elif isinstance(part, _Record):
                waiting.append((f"{path}{name}.", part))
    return found
