"""What every target set would train, from the shapes of its sites alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from clipgraft.errors import TargetError
from clipgraft.lora.targets import TARGET_SETS, select_sites
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.models.family import is_lora
from clipgraft.results import Result

_BYTES_OF_A_WEIGHT = 4


@dataclass(frozen=True, repr=False)
class TargetCost(Result):
    """A LoRA adapter on a target set.

    Attributes:
        targets: the set or expression; of sets that choose the same sites, the first.
        r: rank.
        sites: how many it adapts.
        parameters: of A and B together.
        megabytes: of the adapter's file, fp32, in 10⁶ bytes; the header aside.
        share: of the base's weights.
    """

    targets: str
    r: int
    sites: int
    parameters: int
    megabytes: float
    share: float


def target_costs(
    model: ClipLike, targets: Iterable[str] | None = None, r: int = 16
) -> tuple[TargetCost, ...]:
    """What adapters of rank r would weigh.

    Args:
        model: a `Clip` or raw model, on the meta device too.
        targets: sets or expressions; by default every named set that fits the model.
        r: rank.

    Raises:
        TargetError: one of `targets` matches nothing.
    """
    clip = as_clip(model)
    refs = clip.site_refs
    total = sum(p.numel() for name, p in clip.model.named_parameters() if not is_lora(name))
    names = distinct_sets(model) if targets is None else tuple(targets)
    costs = []
    for name in names:
        chosen = select_sites(list(refs), name)
        shapes = [shape for site in chosen for shape in refs[site].lora_shapes(r)]
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        megabytes = parameters * _BYTES_OF_A_WEIGHT / 1e6
        costs.append(TargetCost(name, r, len(chosen), parameters, megabytes, parameters / total))
    return tuple(costs)


def distinct_sets(model: ClipLike, names: Iterable[str] = tuple(TARGET_SETS)) -> tuple[str, ...]:
    """Those target sets that choose something on this model, each choice once."""
    sites = as_clip(model).sites
    found: dict[tuple[object, ...], str] = {}
    for name in names:
        try:
            found.setdefault(tuple(select_sites(sites, name)), name)
        except TargetError:
            continue
    return tuple(found.values())
