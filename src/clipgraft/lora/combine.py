"""Sum adapters with weights into one: exactly, by concatenating ranks, or cut down to a rank.

Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁·s₁·B₁ … wₙ·sₙ·Bₙ] · [A₁; …; Aₙ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.control import set_adapter, temperature_shift
from clipgraft.lora.initialization import principal
from clipgraft.lora.inject import attach
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter, LoraState, check_name, require_lora, require_unmerged
from clipgraft.lora.variants import PlainLora
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import site_weight
from clipgraft.models.sites import Site
from clipgraft.results import Result


@dataclass(frozen=True, repr=False)
class Combination(Result):
    """Result of `combine_adapters`.

    Attributes:
        name: of the new adapter.
        weights: of each adapter in it.
        ranks: of the new updates, by site.
        error: ‖ΔW - ΔW_r‖ / ‖ΔW‖ over all sites together, in the Frobenius norm; 0 without a cut.
        errors: the same by site.
    """

    _shows = ("name", "weights", "error", "ranks")

    name: str
    weights: dict[str, float]
    ranks: dict[Site, int]
    error: float
    errors: dict[Site, float]


def combine_adapters(
    model: ClipLike,
    weights: Mapping[str, float],
    name: str,
    *,
    rank: int | None = None,
    activate: bool = True,
) -> Combination:
    """Add a new adapter whose update is the weighted sum of others', W + Σ weight · (W' - W).

    Updates are summed exactly, in fp32, by concatenating ranks. DoRA's change of weight has full rank, and so
    has a sum with one. Biases and the log temperature are summed as differences to the base.

    Args:
        model: a `Clip` or raw model that carries the adapters.
        weights: how much of each adapter, by name; negative ones take it away.
        name: of the new adapter; it must be free.
        rank: cut each update down to this rank by a singular value decomposition: the nearest of that rank.
        activate: let the new adapter act from now on.

    Returns:
        Ranks, and what the cut lost.

    Raises:
        AdapterError: an adapter is not there, the name is taken, or something is merged.
        ConfigError: no adapter, a weight that is no number, or a rank below 1.
    """
    clip = as_clip(model)
    state = require_lora(clip)
    require_unmerged(clip, "combine adapters")
    _check(state, weights, name, rank)
    sums = {
        site: _sum(clip, state, weights, site) for site in clip.site_refs if _low_rank(state, weights, site)
    }
    kept = {site: (a, b) if rank is None else cut(a, b, rank) for site, (a, b) in sums.items()}
    squares = {site: (_square(*sums[site]), _lost(sums[site], kept[site])) for site in sums}
    _attach(clip, state, weights, name, kept)
    if activate:
        set_adapter(clip, name)
    whole = sum(all_ for all_, _ in squares.values())
    lost = sum(gone for _, gone in squares.values())
    return Combination(
        name,
        dict(weights),
        {site: a.shape[0] for site, (a, _) in kept.items()},
        _share(lost, whole),
        {site: _share(gone, all_) for site, (all_, gone) in squares.items()},
    )


def cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest B·A of at most a rank, by a small SVD: (R, in), (out, R) -> (r, in), (out, r)."""
    if a.shape[0] <= rank:
        return a, b
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = principal(r_b @ r_a.T, rank)
    root = s.sqrt()
    return root[:, None] * (v @ q_a.T), (q_b @ u) * root


def _check(state: LoraState, weights: Mapping[str, float], name: str, rank: int | None) -> None:
    check_name(name)
    if name in state.adapters:
        raise AdapterError(f"the name {name!r} is taken: remove_lora(model, {name!r}) first, or give another")
    for given in weights:
        state.named(given)
    faults = [f"weight of {given!r} is {w}" for given, w in weights.items() if not math.isfinite(w)]
    if not weights:
        faults.append("no adapter is given")
    if rank is not None and rank < 1:
        faults.append(f"rank is {rank}, allowed is 1 and up")
    if faults:
        raise ConfigError(f"combine_adapters: {'; '.join(faults)}")


def _low_rank(state: LoraState, weights: Mapping[str, float], site: Site) -> dict[str, LoraLayer]:
    layers = {name: state.adapters[name].layers.get(site) for name in weights}
    return {name: layer for name, layer in layers.items() if layer is not None and layer.r}


def _sum(clip: Clip, state: LoraState, weights: Mapping[str, float], site: Site) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) of the weighted sum at a site, its scale in B; convolutions flattened."""
    weight = site_weight(clip.model, clip.site_refs[site])
    parts = [
        (a, b * weights[name])
        for name, layer in _low_rank(state, weights, site).items()
        for a, b in (layer.change_factors(weight),)
    ]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)


def _attach(
    clip: Clip,
    state: LoraState,
    weights: Mapping[str, float],
    name: str,
    factors: Mapping[Site, tuple[Tensor, Tensor]],
) -> None:
    """Attach the new adapter, with scale 1 at every site."""
    sources = {given: state.adapters[given] for given in weights}
    ranks = {str(site): a.shape[0] for site, (a, _) in factors.items()}
    biases = {adapter.settings.bias for adapter in sources.values()}
    settings = LoraConfig(
        r=max(ranks.values()),
        alpha=max(ranks.values()),
        targets=",".join(ranks),
        rank_pattern=ranks,
        alpha_pattern={site: float(r) for site, r in ranks.items()},
        train_logit_scale=any(adapter.settings.train_logit_scale for adapter in sources.values()),
        bias="all" if "all" in biases else "lora_only" if "lora_only" in biases else "none",
    )
    combined = attach(clip, settings, name, activate=False)
    with torch.no_grad():
        for site, (a, b) in factors.items():
            layer = combined.layers[site]
            assert isinstance(layer, PlainLora)
            layer.lora_A.copy_(a.view(layer.lora_A.shape))
            layer.lora_B.copy_(b.view(layer.lora_B.shape))
        _sum_biases(combined, sources, weights)
        if moved := temperature_shift(clip, state, weights):
            combined.temperature = {part: base + moved[part] for part, base in state.base_temperature.items()}
    combined.settings = settings.replace(
        rank_pattern=_others(ranks, settings.r),
        alpha_pattern=_others({site: float(r) for site, r in ranks.items()}, settings.alpha),
    )


_N = TypeVar("_N", int, float)


def _others(values: Mapping[str, _N], usual: float) -> dict[str, _N]:
    return {site: value for site, value in values.items() if value != usual}


def _sum_biases(combined: Adapter, sources: Mapping[str, Adapter], weights: Mapping[str, float]) -> None:
    for site, layer in combined.layers.items():
        for given, adapter in sources.items():
            own = adapter.layers.get(site)
            if layer.lora_bias is not None and own is not None and own.lora_bias is not None:
                layer.lora_bias.add_(own.lora_bias, alpha=weights[given])
    for path, module in combined.norms.items():
        for given, adapter in sources.items():
            if path in adapter.norms:
                module.lora_bias.add_(adapter.norms[path].lora_bias, alpha=weights[given])


def _square(a: Tensor, b: Tensor) -> float:
    """‖B·A‖² without the product itself."""
    return float(((a @ a.T).double() * (b.T @ b).double()).sum())


def _lost(whole: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> float:
    """‖B·A - B_r·A_r‖², which is not taken as a difference of squares: that would lose small errors."""
    if whole[0] is kept[0]:
        return 0.0
    a = torch.cat([whole[0], kept[0]])
    b = torch.cat([whole[1], -kept[1]], dim=1)
    (_, r_a), (_, r_b) = torch.linalg.qr(a.T.double()), torch.linalg.qr(b.double())
    return float((r_b @ r_a.T).square().sum())


def _share(part: float, whole: float) -> float:
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else 0.0
