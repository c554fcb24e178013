"""Express an adapter at one rank and one scale, for formats that hold no others, without changing its update.

Ranks are evened out with rows of zeros in A and columns of zeros in B, which add exactly nothing to B·A.
Where a site's scale s differs from the common s₀, B becomes B·s/s₀, so that s₀·B·A is what s·B·A was; the
product is taken in fp64 and rounded to fp32 once (to the bit where s/s₀ is a power of two).

What such a format has no place for (own ranks, base, temperature, metrics) is kept under the key `clipgraft`.
Other readers pass it over; without it a file is read all the same, at the format's own rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, pairs, site_scale, site_scales
from clipgraft.lora.config import LoraConfig
from clipgraft.models.sites import Site
from clipgraft.records import Finite, Rank

Weights = dict[Site, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Uniform:
    """Linear weights of one rank and one scale: ΔW = scale·B·A, A (r, in), B (out, r), fp32."""

    weights: Weights
    r: int
    scale: float


def uniform(weights: Mapping[Site, tuple[Tensor, Tensor]], settings: LoraConfig) -> Uniform:
    """Linear weights brought to their largest rank and their most frequent scale."""
    r = max(a.shape[0] for a, _ in weights.values())
    scales = site_scales({site: a.shape[0] for site, (a, _) in weights.items()}, settings)
    common = Counter(scales.values()).most_common(1)[0][0]
    padded = {site: _pad(a, b, r) for site, (a, b) in weights.items()}
    return Uniform({site: (a, fold(b, scales[site] / common)) for site, (a, b) in padded.items()}, r, common)


def rescaled(update: Uniform, scale: float) -> Uniform:
    """The same update at another scale."""
    factor = update.scale / scale
    return Uniform({site: (a, fold(b, factor)) for site, (a, b) in update.weights.items()}, update.r, scale)


def fold(b: Tensor, factor: float) -> Tensor:
    """B·factor, rounded once."""
    return (b.detach().to("cpu", torch.float64) * factor).to(torch.float32).contiguous()


def _pad(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - a.shape[0]
    a, b = (t.detach().to("cpu", torch.float32) for t in (a, b))
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()


KEY = "clipgraft"


@dataclass(frozen=True)
class Base:
    """A base as adapter files name it."""

    name: str = ""
    pretrained: str | None = ""
    family: str = ""


@dataclass(frozen=True)
class Extras:
    """The entry `clipgraft` of a foreign format."""

    base: Base
    ranks: dict[str, Rank]
    metrics: dict[str, Any]
    targets: str = ""
    fingerprint: str | None = None
    logit_scale: Finite | None = None


def extras_of(adapter: AdapterFile) -> dict[str, Any]:
    """`Extras` of an adapter as plain values, which `weights_only` opens."""
    return {
        "base": dict(adapter.base),
        "fingerprint": adapter.fingerprint,
        "logit_scale": adapter.logit_scale,
        "metrics": dict(adapter.metrics),
        "targets": adapter.settings.targets,
        "ranks": {str(site): a.shape[0] for site, (a, _) in adapter.weights.items()},
    }


def with_extras(adapter: AdapterFile, extras: Extras | None) -> AdapterFile:
    """`adapter` as it was before it was written: its own ranks, base, temperature and metrics."""
    if extras is None:
        return adapter
    weights, settings = _own_ranks(adapter, extras.ranks)
    named = {"name": extras.base.name, "pretrained": extras.base.pretrained, "family": extras.base.family}
    return replace(
        adapter,
        parts=pairs(weights),
        settings=settings.replace(
            targets=extras.targets or settings.targets, train_logit_scale=extras.logit_scale is not None
        ),
        base={key: value or adapter.base.get(key, "") for key, value in named.items()},
        fingerprint=extras.fingerprint,
        logit_scale=extras.logit_scale,
        metrics=dict(extras.metrics),
    )


def _own_ranks(adapter: AdapterFile, ranks: Mapping[str, int]) -> tuple[Weights, LoraConfig]:
    """Weights without the zeros that evened out their ranks, at the scales they had with them."""
    weights: Weights = {}
    settings = adapter.settings
    rank_pattern, alpha_pattern = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    for site, (a, b) in adapter.weights.items():
        r = ranks.get(str(site))
        if r is None or r >= a.shape[0] or not _is_padding(a, b, r):
            weights[site] = a, b
            continue
        weights[site] = a[:r].clone(), b[:, :r].clone()
        scale = site_scale(settings, site, a.shape[0])
        rank_pattern[str(site)] = r
        alpha_pattern[str(site)] = scale * (math.sqrt(r) if settings.use_rslora else r)
    return weights, settings.replace(rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def _is_padding(a: Tensor, b: Tensor, r: int) -> bool:
    return not (a[r:].any() or b[:, r:].any())
