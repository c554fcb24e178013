"""`.pt` files from strangers: opened without running any code of theirs, and written whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.files import atomic_path
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import check_variant
from clipgraft.readers import placeholder
from clipgraft.writing import size_of

_HUGE = 10**15


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary of a `torch.save` file, its tensors on the CPU and, where possible, mapped from disk.

    Raises:
        AdapterError: no such file, damaged, no dictionary, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        what = "that is a folder, not a file" if path.exists() else "there is no such file or folder"
        raise AdapterError(f"no adapter at {path}: {what}; check the path")
    if problem := placeholder(path):
        raise AdapterError(f"{path} cannot be read: {problem}")
    try:
        _check_archive(path)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise AdapterError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise AdapterError(f"{path} holds no named weights: it is no adapter; check the path")
    return value


def lora_config(path: Path, **values: Any) -> LoraConfig:
    """The options that a file says; raises AdapterError for values that none has."""
    try:
        config = LoraConfig(**values)
        check_variant(config)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}: save the adapter again") from error
    return config


def _check_archive(path: Path) -> None:
    """Refuse archives that unpack to more than they hold; torch compresses none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("compressed archive")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check its permissions and disk"
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code; save its weights as a dictionary"
    if "weights_only" in text or "Weights only" in text or "Unsupported global" in text:
        return "it holds pickled code or objects, which are never loaded; save tensors and plain values only"
    return "it is truncated, damaged or no torch checkpoint; copy or save it again"


def save_checkpoint(data: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    with atomic_path(path, size_of(data)) as temporary:
        torch.save(dict(data), temporary)


def as_weight(value: object, name: str, path: Path, ndim: int = 2) -> Tensor:
    """One weight of a checkpoint as fp32, detached from the file.

    Raises:
        AdapterError: it is no dense floating-point tensor of `ndim` dimensions, or claims more elements than
            the file holds.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and value.device.type == "cpu" and value.is_floating_point()
        if not dense or value.ndim != ndim or not value.numel():
            kind = f"{value.dtype} of shape {tuple(value.shape)}"
        # A stride of zero makes terabytes of a few stored bytes.
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            kind = "a tensor larger than what is stored"
        else:
            return value.detach().to(torch.float32, copy=True).contiguous()
    raise AdapterError(f"{path}: {name!r} is {kind} where LoRA weights belong: save the adapter again")


def paired(halves: Mapping[Any, Mapping[str, Tensor]], path: Path) -> dict[Any, tuple[Tensor, Tensor]]:
    """A and B together.

    Raises:
        AdapterError: there are none, one half is missing, or their ranks differ.
    """
    if not halves:
        raise AdapterError(f"{path} holds no LoRA weights: it is no adapter; check the path")
    single = [str(site) for site, parts in halves.items() if set(parts) != {"A", "B"}]
    if single:
        raise AdapterError(f"{path} lacks A or B for {some(single)}: it is incomplete; save it again")
    for site, parts in halves.items():
        a, b = parts["A"].shape, parts["B"].shape
        if a[0] != b[1]:
            raise AdapterError(
                f"{path}: {site} has A {tuple(a)}, B {tuple(b)}, of different ranks; save it again"
            )
    return {site: (parts["A"], parts["B"]) for site, parts in halves.items()}


def mapping(data: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The dictionary `data[key]`; raises AdapterError where there is none or its keys are no names."""
    value = data.get(key)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return dict(value)
    raise AdapterError(f"{path}: {key!r} is {type(value).__name__} where a dictionary belongs: save it again")


def number(config: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """A finite number of a configuration; raises AdapterError where it is missing or something else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise AdapterError(
            f"{path}: {key!r} is {shown(value)} where a number belongs: save the adapter again"
        )
    return value


def rank(config: Mapping[str, Any], path: Path) -> int:
    """`r` of a configuration; raises AdapterError unless it is a whole number from 1 up."""
    value = number(config, "r", path)
    if value != int(value) or value < 1:
        raise AdapterError(f"{path}: rank {value!r} is no whole number from 1 up: save the adapter again")
    return int(value)


def shown(value: object) -> str:
    """A value of a stranger's file in a few words of one line."""
    if (
        isinstance(value, (str, float, bool))
        or value is None
        or (isinstance(value, int) and abs(value) < _HUGE)
    ):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def text(config: Mapping[str, Any], key: str) -> str:
    """A text of a configuration; empty where there is none."""
    value = config.get(key)
    return value if isinstance(value, str) else ""


def some(names: Iterable[object], most: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
