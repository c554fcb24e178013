"""Describe a model or an adapter without a base's weights: configuration, structure, layers, sites, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.convert import adapter_place, detect, read_any
from clipgraft.errors import ModelError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import variant_of
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.convert import config_of
from clipgraft.models.export import size_on_disk
from clipgraft.models.meta import ModelConfig, Overrides, build_model, read_model_config
from clipgraft.models.sites import SiteKind
from clipgraft.profile.forward import ClipProfile, costs
from clipgraft.profile.tables import sites_table, structure
from clipgraft.profile.training import TargetCost, target_costs
from clipgraft.results import Result
from clipgraft.text_tables import Table


@dataclass(frozen=True)
class SiteInfo:
    """One site: what it is called, how its weight is used and its canonical shape."""

    site: str
    kind: SiteKind
    shape: tuple[int, ...]
    lora_parameters: int


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """A model.

    Attributes:
        name: what it was asked for by.
        library: whose it is.
        config: its configuration.
        structure: its modules.
        profile: layers, shapes and cost of one image and one text.
        r: rank of the adapters below.
        sites: in the order of the data flow, with the weights of an update of rank r.
        targets: what an adapter on each target set would weigh.
    """

    _shows = ("name", "library", "profile", "r", "sites")

    name: str
    library: str
    config: dict[str, Any]
    structure: str
    profile: ClipProfile
    r: int
    sites: tuple[SiteInfo, ...]
    targets: tuple[TargetCost, ...]

    def table(self) -> Table:
        """The sites, with what an update of rank r weighs; of a role those of all blocks in one row."""
        return sites_table(self.sites, self.r)


def inspect(
    name: str | Path | ClipLike,
    overrides: Overrides | None = None,
    *,
    pretrained: str | None = None,
    targets: Iterable[str] | None = None,
    r: int = 16,
) -> Inspection:
    """Describe a model without its weights.

    Args:
        name: as for `clip_on_meta`; or a model, whose weights are not looked at.
        overrides, pretrained: as for `clip_on_meta`, of a name alone.
        targets: target sets or expressions; by default every named set that fits.
        r: rank of their adapters.

    Raises:
        ModelError: there is no such model or setting.
        TargetError: one of `targets` matches nothing.
    """
    if isinstance(name, str | Path):
        config = read_model_config(name, overrides, pretrained)
    else:
        if overrides or pretrained:
            raise ModelError("overrides and pretrained are for a model's name; this model is there already")
        config = config_of_model(as_clip(name))
    clip = build_model(config)
    return Inspection(
        name=config.name,
        library=config.library,
        config=config.values,
        structure=structure(clip.model),
        profile=costs(clip),
        r=r,
        sites=tuple(_sites(clip, r)),
        targets=target_costs(clip, targets, r),
    )


def config_of_model(clip: Clip) -> ModelConfig:
    """Return the configuration of a model that is in memory; raises ModelError where it has none."""
    if clip.family.name != "open_clip" and not hasattr(clip.model, "config"):
        raise ModelError(
            f"{type(clip.model).__name__} has no configuration, of which its structure is built anew: "
            "clipgraft.profile.costs takes the model itself"
        )
    name, kind = clip.source.name or type(clip.model).__name__, type(clip.model).__name__
    if clip.family.name != "open_clip":
        values = {**clip.model.config.to_dict(), "architectures": [kind]}  # type: ignore[union-attr, operator]
        return ModelConfig(name, "transformers", values)
    try:
        return ModelConfig(name, "open_clip", config_of(clip))
    except ModelError as error:
        raise ModelError(
            f"open_clip has no configuration of this {kind}, of which its structure is built anew: "
            "clipgraft.profile.costs takes the model itself"
        ) from error


def _sites(clip: Clip, r: int) -> Iterable[SiteInfo]:
    for site, ref in clip.site_refs.items():
        weights = sum(math.prod(shape) for shape in ref.lora_shapes(r))
        yield SiteInfo(str(site), ref.kind, ref.shape, weights)


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
    """Describe an adapter of any format that can be read, or that of a run; its base is not needed.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    place = adapter_place(Path(path))
    form = detect(place)
    file = read_any(place, peft_out_proj="as-meant")
    others = [*file.shared.values(), *file.biases.values(), *file.offsets.values()]
    sites = tuple(_adapted_sites(file))
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
        parts=tuple(_other_parts(file)),
        metrics=file.metrics,
    )


def _adapted_sites(file: AdapterFile) -> list[AdaptedSite]:
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


def _other_parts(file: AdapterFile) -> list[str]:
    beyond = variant_of(file.settings).beyond_lora
    parts = {
        f"{beyond} of {len(file.parts)} sites": beyond and file.parts,
        f"biases of {len(file.biases)} layers": file.biases,
        f"biases of B at {len(file.offsets)} sites": file.offsets,
        f"whole weights of {len(file.full)} sites": file.full,
        f"a trained temperature (log {file.logit_scale})": file.logit_scale is not None,
        f"a trained logit bias ({file.logit_bias})": file.logit_bias is not None,
    }
    return [name for name, there in parts.items() if there]
