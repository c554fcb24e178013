"""An adapter apart from any model, and the same adapter at one rank and one scale.

Some formats hold no others. Ranks are evened out with rows of zeros in A and columns of zeros in B, which
add exactly nothing to B·A. Where a site's scale s differs from the common s₀, B becomes B·s/s₀, so that
s₀·B·A is what s·B·A was; the product is taken in fp64 and rounded to fp32 once (to the bit where s/s₀ is a
power of two).

What such a format has no place for (own ranks, base, temperature, metrics) is kept under the key `clipgraft`.
Other readers pass it over; without it a file is read all the same, at the format's own rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import variant_of
from clipgraft.models.names import CLIP, Twin
from clipgraft.models.sites import Site
from clipgraft.records import Finite, Rank
from clipgraft.results import Result

Weights = dict[Site, tuple[Tensor, Tensor]]
KEY = "clipgraft"


@dataclass(frozen=True, repr=False)
class AdapterFile(Result):
    """An adapter apart from any model.

    Attributes:
        path: where it was read.
        parts: what its variant stores of each site (`LoraLayer.part_shapes`), fp32, by attribute name.
        settings: what made them; ranks and alphas per site are exact.
        shared: what its variant stores of all sites together, by name.
        config: `adapter_config.json`, as PEFT reads it.
        base: `name`, `pretrained` and `family` of the base; empty where a foreign file does not say.
        fingerprint: of the base, None for foreign files.
        logit_scale: the trained log temperature, None if it is not part of the adapter.
        logit_bias: the trained bias of SigLIP's logits, likewise.
        metrics: what was measured when it was saved.
        biases: whole biases, (out,), by the path of their module in the twin.
        offsets: (out,) by site, PEFT's biases of B, which the scale acts on.
        full: whole weights, (out, in), by site: what PEFT calls modules to save.
        path_prefix: what PEFT's module paths lacked of those of the twin (`adapters.peft`).
        twin: the class of transformers whose module names the base goes by.
        started_from: the adapter file that its training began with; empty for one that began anew.
    """

    _shows = ("path", "sites", "base", "fingerprint", "metrics")
    _hidden = frozenset({"parts", "shared", "biases", "offsets", "full", "twin"})

    path: Path
    parts: dict[Site, dict[str, Tensor]]
    settings: LoraConfig
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    logit_scale: float | None = None
    logit_bias: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[Site, Tensor] = field(default_factory=dict)
    full: dict[Site, Tensor] = field(default_factory=dict)
    path_prefix: str = ""
    twin: Twin = CLIP
    started_from: str = ""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts with an update of its variant."""
        return tuple(self.parts)

    @property
    def weights(self) -> Weights:
        """A and B by site, in the shapes of `SiteRef.lora_shapes`, of variants that store them."""
        return {
            site: (parts["lora_A"], parts["lora_B"])
            for site, parts in self.parts.items()
            if "lora_A" in parts and "lora_B" in parts
        }

    @property
    def ranks(self) -> dict[Site, int]:
        """The rank of every site."""
        kind = variant_of(self.settings)
        return {site: kind.rank_of(parts) or 0 for site, parts in self.parts.items()}

    @property
    def scales(self) -> dict[Site, float]:
        """The s of W + s·B·A by site."""
        return {site: _site_scale(self.settings, site, r) for site, r in self.ranks.items()}

    @property
    def temperature(self) -> dict[str, float]:
        """The trained parts of `Clip.temperature`, by name; empty if it trains none."""
        parts = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        return {name: value for name, value in parts.items() if value is not None}

    @property
    def needs_base(self) -> bool:
        """Whether only the base tells what the update is: whole weights, biases of B, and PEFT's PiSSA."""
        return bool(self.full or self.offsets or self.config.get("init_lora_weights") == "pissa")

    def require_plain(self, form: str) -> None:
        """Refuse to leave something out; raises AdapterError naming what a format cannot hold."""
        variant = variant_of(self.settings)
        parts: dict[str, object] = {
            variant.beyond_lora: variant.beyond_lora and self.parts,
            "biases": self.biases or self.offsets,
            "whole weights": self.full,
        }
        held = [name for name, values in parts.items() if values]
        if held:
            raise AdapterError(
                f"{self.path} has {' and '.join(held)}, which {form} cannot hold: "
                "write an adapter folder instead"
            )


def _site_scale(settings: LoraConfig, site: Site, r: int) -> float:
    alpha = settings.alpha_pattern.get(str(site), settings.alpha)
    return variant_of(settings).scale_of(alpha, r, settings.use_rslora)


def with_scale(settings: LoraConfig, site: Site, r: int, scale: float) -> LoraConfig:
    """The settings with another rank and scale of a site."""
    alpha = scale * (math.sqrt(r) if settings.use_rslora else r)
    return settings.replace(
        rank_pattern={**settings.rank_pattern, str(site): r},
        alpha_pattern={**settings.alpha_pattern, str(site): alpha},
    )


def parts_of(weights: Weights) -> dict[Site, dict[str, Tensor]]:
    """A and B by site as `AdapterFile.parts`."""
    return {site: {"lora_A": a, "lora_B": b} for site, (a, b) in weights.items()}


@dataclass(frozen=True)
class Uniform:
    """Linear weights of one rank and one scale: ΔW = scale·B·A, A (r, in), B (out, r), fp32."""

    weights: Weights
    r: int
    scale: float


def uniform(adapter: AdapterFile) -> Uniform:
    """Linear weights of plain LoRA brought to their largest rank and their most frequent scale."""
    r, scales = max(adapter.ranks.values()), adapter.scales
    common = Counter(scales.values()).most_common(1)[0][0]
    padded = {site: _pad(a, b, r) for site, (a, b) in adapter.weights.items()}
    return Uniform({site: (a, _fold(b, scales[site] / common)) for site, (a, b) in padded.items()}, r, common)


def rescaled(update: Uniform, scale: float) -> Uniform:
    """The same update at another scale."""
    factor = update.scale / scale
    return Uniform({site: (a, _fold(b, factor)) for site, (a, b) in update.weights.items()}, update.r, scale)


def _fold(b: Tensor, factor: float) -> Tensor:
    """B·factor, rounded once."""
    return (b.detach().to("cpu", torch.float64) * factor).to(torch.float32).contiguous()


def _pad(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - a.shape[0]
    a, b = (t.detach().to("cpu", torch.float32) for t in (a, b))
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()


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
    logit_bias: Finite | None = None


def extras_of(adapter: AdapterFile) -> dict[str, Any]:
    """`Extras` of an adapter as plain values, which `weights_only` opens."""
    return {
        "base": dict(adapter.base),
        "fingerprint": adapter.fingerprint,
        "logit_scale": adapter.logit_scale,
        **({} if adapter.logit_bias is None else {"logit_bias": adapter.logit_bias}),
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
        parts=parts_of(weights),
        settings=settings.replace(
            targets=extras.targets or settings.targets, train_logit_scale=extras.logit_scale is not None
        ),
        base={key: value or adapter.base.get(key, "") for key, value in named.items()},
        fingerprint=extras.fingerprint,
        logit_scale=extras.logit_scale,
        logit_bias=extras.logit_bias,
        metrics=dict(extras.metrics),
    )


def _own_ranks(adapter: AdapterFile, ranks: Mapping[str, int]) -> tuple[Weights, LoraConfig]:
    """Weights without the zeros that evened out their ranks, at the scales they had with them."""
    weights: Weights = {}
    settings = adapter.settings
    for site, (a, b) in adapter.weights.items():
        r = ranks.get(str(site))
        if r is None or r >= a.shape[0] or a[r:].any() or b[:, r:].any():
            weights[site] = a, b
            continue
        weights[site] = a[:r].clone(), b[:, :r].clone()
        settings = with_scale(settings, site, r, _site_scale(settings, site, a.shape[0]))
    return weights, settings
