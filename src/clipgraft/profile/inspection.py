"""What a model is, without its weights: configuration, structure, layers, sites, and sizes of adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.convert import config_of
from clipgraft.models.meta import ModelConfig, Overrides, build_model, read_model_config
from clipgraft.models.sites import SiteKind
from clipgraft.profile.forward import ClipProfile, costs
from clipgraft.profile.layers import structure
from clipgraft.profile.targets import TargetCost, target_costs
from clipgraft.results import Result


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


def inspect(
    name: str | Path | ClipLike,
    overrides: Overrides | None = None,
    *,
    pretrained: str | None = None,
    targets: Iterable[str] | None = None,
    r: int = 16,
) -> Inspection:
    """Look at a model without its weights.

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
    """The configuration of a model that is in memory."""
    values = config_of(clip) if clip.family.name == "open_clip" else clip.model.config.to_dict()  # type: ignore[union-attr, operator]
    return ModelConfig(clip.source.name or type(clip.model).__name__, clip.family.name, dict(values))  # type: ignore[arg-type]


def _sites(clip: Clip, r: int) -> Iterable[SiteInfo]:
    for site, ref in clip.site_refs.items():
        weights = sum(math.prod(shape) for shape in ref.lora_shapes(r))
        yield SiteInfo(str(site), ref.kind, ref.shape, weights)
