"""Say what of a model a named target set does not reach.

A set means roles, and towers differ in the roles that they have: `linear` on a convolutional tower is less
than its name says.
"""

from __future__ import annotations

import math

from clipgraft.lora.targets import TARGET_SETS, match_sites, named_sets
from clipgraft.models.clip import Clip
from clipgraft.models.family import base_parameter
from clipgraft.models.sites import (
    EMBEDDING_ROLES,
    PROJECTION_ROLES,
    ROLES_IN_BLOCKS,
    TOWERS,
    Site,
    SiteRef,
    Tower,
)

_OUTSIDE = (*EMBEDDING_ROLES, *PROJECTION_ROLES)
_LINEAR = ("q", "fc1")  # a set with both means all linear layers of a tower
_ENOUGH = 0.9


def uncovered(clip: Clip, targets: str) -> list[str]:
    """A line for each named set and tower that the set means and reaches only in part, or not at all."""
    lines = []
    for term in named_sets(targets):
        for tower in TOWERS:
            line = _shortfall(clip, term, tower)
            if line:
                lines.append(line)
    return lines


def _shortfall(clip: Clip, term: str, tower: Tower) -> str:
    means = {role for role in ROLES_IN_BLOCKS if TARGET_SETS[term](Site(tower, 0, role))}
    if not means or not clip.family.tower_groups(clip.model, tower):
        return ""
    refs = clip.site_refs
    matched = match_sites(list(refs), term)
    inside = [refs[s] for s in matched if s.tower == tower and s.role not in _OUTSIDE]
    kind = type(clip.model.visual).__name__ if hasattr(clip.model, "visual") else type(clip.model).__name__
    where = f"vision tower (a {kind})" if tower == "vision" else "text tower"
    if not inside:
        return (
            f"targets '{term}' adapt {len(matched)} sites and none in the {where}, which has no site of "
            f"these roles: {_offer(refs, tower)}"
        )
    share = _weights(inside) / max(_tower_weights(clip, tower), 1)
    if set(_LINEAR) <= means and share < _ENOUGH:
        return (
            f"targets '{term}' reach {len(inside)} sites of the {where}, {share:.0%} of the weights of its "
            f"layers: {_offer(refs, tower)}"
        )
    return ""


def _weights(refs: list[SiteRef]) -> int:
    return sum(math.prod(ref.shape) for ref in refs)


def _tower_weights(clip: Clip, tower: Tower) -> int:
    """Number of weights in a tower's matrices and convolutions, those at its ends left out."""
    parameters = {p for group in clip.family.tower_groups(clip.model, tower) for p in group}
    layers = sum(p.numel() for p in parameters if p.ndim in (2, 4))
    ends = [
        ref
        for site, ref in clip.site_refs.items()
        if site.tower == tower and site.role in _OUTSIDE and _is_counted(clip, ref)
    ]
    return layers - _weights(ends)


def _is_counted(clip: Clip, ref: SiteRef) -> bool:
    """Whether the weight of a site is among the matrices; some tables have a leading dimension of 1."""
    return base_parameter(clip.model.get_submodule(ref.module), ref.parameter).ndim in (2, 4)


def _offer(refs: dict[Site, SiteRef], tower: Tower) -> str:
    roles = dict.fromkeys(s.role for s in refs if s.tower == tower)
    return f"it has {', '.join(roles)}" if roles else "nothing in it can carry LoRA"
