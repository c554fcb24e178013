"""What an adapter is, apart from its base: format, settings, sites, sizes, and the base that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.convert import adapter_place, detect, read_any
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import variant_of
from clipgraft.models.export import size_on_disk


@dataclass(frozen=True)
class AdaptedSite:
    """One site that an adapter changes: rank and scale of its update, shape and number of weights."""

    site: str
    r: int
    scale: float
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter.

    Attributes:
        path: the folder or file it lies in.
        format: whose it is, as `clipgraft.adapters.convert.detect` names it.
        base: name, tag and family of its base; empty where the file does not say.
        fingerprint: of its base; None in files of others.
        settings: what made it.
        sites: in the order of the file; with whole weights, r is 0.
        parameters: number of its weights, magnitudes and biases included.
        bytes: on disk.
        started_from: the adapter that its training began with; empty for one that began anew.
        parts: what it has besides A and B, in words.
        metrics: what was measured when it was saved.
    """

    path: Path
    format: str
    base: dict[str, str]
    fingerprint: str | None
    settings: LoraConfig
    sites: tuple[AdaptedSite, ...]
    parameters: int
    bytes: int
    started_from: str
    parts: tuple[str, ...]
    metrics: dict[str, Any]


def inspect_adapter(path: str | Path) -> AdapterInspection:
    """Look at an adapter of any format that is read, or at that of a run; its base is not needed.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    place = adapter_place(Path(path))
    form = detect(place)
    file = read_any(place, peft_out_proj="as-meant")
    others = [*file.shared.values(), *file.biases.values(), *file.offsets.values()]
    sites = tuple(_sites(file))
    return AdapterInspection(
        path=file.path,
        format=form,
        base=file.base,
        fingerprint=file.fingerprint,
        settings=file.settings,
        sites=sites,
        parameters=sum(site.parameters for site in sites) + sum(tensor.numel() for tensor in others),
        bytes=size_on_disk(file.path),
        started_from=file.started_from,
        parts=tuple(_parts(file)),
        metrics=file.metrics,
    )


def _sites(file: AdapterFile) -> list[AdaptedSite]:
    scales = file.scales
    found = [
        AdaptedSite(
            str(site),
            r,
            scales[site],
            _shape(file.parts[site]),
            sum(tensor.numel() for tensor in file.parts[site].values()),
        )
        for site, r in file.ranks.items()
    ]
    return found + [
        AdaptedSite(str(site), 0, 1.0, tuple(whole.shape), whole.numel()) for site, whole in file.full.items()
    ]


def _shape(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The canonical shape of a site's weight, as far as its file tells: inputs are known by A alone."""
    if "lora_A" in parts:
        return (parts["lora_B"].shape[0], *parts["lora_A"].shape[1:])
    return (max(len(tensor) for tensor in parts.values()),)


def _parts(file: AdapterFile) -> list[str]:
    beyond = variant_of(file.settings).beyond_lora
    parts = {
        f"{beyond} of {len(file.parts)} sites": beyond and file.parts,
        f"biases of {len(file.biases)} layers": file.biases,
        f"biases of B at {len(file.offsets)} sites": file.offsets,
        f"whole weights of {len(file.full)} sites": file.full,
        f"a trained temperature (log {file.logit_scale})": file.logit_scale is not None,
    }
    return [name for name, there in parts.items() if there]
