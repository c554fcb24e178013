"""The tensors of a TorchScript archive, read past the code that it holds.

`torch.jit.load` would run what the archive says. An archive is a zip with the model's attributes pickled in
`data.pkl`, its bytes under `data/`, and programs under `code/`, which are not looked at here. The pickle is
read by an unpickler that knows tensors and plain containers; classes of the archive become bare records.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`."""
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
