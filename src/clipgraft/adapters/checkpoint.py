"""Adapter files from elsewhere, opened without running any code of theirs: records, tensors, settings.

Values are checked before anything interprets them: records become dataclasses (`clipgraft.records`), tensors
dense fp32 ones that own their memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.files import atomic_path
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import check_variant
from clipgraft.models.sites import Site
from clipgraft.records import checked, read_pt
from clipgraft.writing import size_of

T = TypeVar("T")
K = TypeVar("K")
AGAIN = "save the adapter again"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary of a `torch.save` file; its tensors are on the CPU, mapped from disk if possible.

    Raises:
        AdapterError: no such file, damaged, no dictionary, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        what = "that is a folder, not a file" if path.exists() else "there is no such file or folder"
        raise AdapterError(f"no adapter at {path}: {what}; check the path")
    return read_pt(path, dict[str, Any], AdapterError, "copy or save it again")


def as_record(data: object, kind: type[T], where: object) -> T:
    """Check a dictionary from a file into a dataclass; raises AdapterError that names the file and field."""
    return checked(data, kind, str(where), AdapterError, AGAIN, finite=False)


def lora_config(
    path: Path,
    r: int,
    alpha: float,
    ranks: Mapping[Site, int],
    alphas: Mapping[Site, float],
    **others: Any,
) -> LoraConfig:
    """The options that a file says, with the rank and alpha of each of its sites.

    Raises:
        AdapterError: a value is none that the option can have.
    """
    values = {
        "targets": ",".join(map(str, ranks)),
        "rank_pattern": {str(site): own for site, own in ranks.items() if own != r},
        "alpha_pattern": {str(site): own for site, own in alphas.items() if own != alpha},
        **others,
    }
    try:
        config = LoraConfig(r=r, alpha=alpha, **values)
        check_variant(config)
    except ConfigError as error:
        faults = "; ".join(str(error).splitlines())
        raise AdapterError(f"{path}: {faults}: save the adapter again") from error
    return config


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


def paired(halves: Mapping[K, Mapping[str, Tensor]], path: Path) -> dict[K, tuple[Tensor, Tensor]]:
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


def some(names: Iterable[object], most: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
