"""One rank and one scale for all sites, for formats that hold no others: the update stays what it was.

Ranks are evened out with rows of zeros in A and columns of zeros in B, which add exactly nothing to B·A.
Where a site's scale s differs from the common s₀, B becomes B·s/s₀, so that s₀·B·A is what s·B·A was; the
product is taken in fp64 and rounded to fp32 once (to the bit where s/s₀ is a power of two).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.lora.config import LoraConfig
from clipgraft.models.sites import Site

Weights = dict[Site, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Uniform:
    """Linear weights of one rank and one scale: ΔW = scale·B·A, A (r, in), B (out, r), fp32."""

    weights: Weights
    r: int
    scale: float


def site_scale(settings: LoraConfig, site: Site, r: int) -> float:
    """α/r or α/√r of one site of rank `r`."""
    alpha = settings.alpha_pattern.get(str(site), settings.alpha)
    return alpha / (math.sqrt(r) if settings.use_rslora else r)


def site_scales(weights: Mapping[Site, tuple[Tensor, Tensor]], settings: LoraConfig) -> dict[Site, float]:
    """The scale of every site."""
    return {site: site_scale(settings, site, a.shape[0]) for site, (a, _) in weights.items()}


def uniform(weights: Mapping[Site, tuple[Tensor, Tensor]], settings: LoraConfig) -> Uniform:
    """Linear weights brought to their largest rank and their most frequent scale."""
    r = max(a.shape[0] for a, _ in weights.values())
    scales = site_scales(weights, settings)
    common = Counter(scales.values()).most_common(1)[0][0]
    padded = {site: _padded(a, b, r) for site, (a, b) in weights.items()}
    return Uniform({site: (a, fold(b, scales[site] / common)) for site, (a, b) in padded.items()}, r, common)


def rescaled(update: Uniform, scale: float) -> Uniform:
    """The same update at another scale."""
    factor = update.scale / scale
    return Uniform({site: (a, fold(b, factor)) for site, (a, b) in update.weights.items()}, update.r, scale)


def fold(b: Tensor, factor: float) -> Tensor:
    """B·factor, rounded once."""
    return (b.detach().to("cpu", torch.float64) * factor).to(torch.float32).contiguous()


def plain(value: float) -> float:
    """16.0 -> 16: a configuration that a person may read."""
    return int(value) if value == int(value) else value


def _padded(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - a.shape[0]
    a, b = (t.detach().to("cpu", torch.float32) for t in (a, b))
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()
