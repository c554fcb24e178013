"""What clipgraft knows of an adapter and a foreign format has no place for, under the key `clipgraft`.

Other readers pass it over; without it a file is read all the same, at the format's own rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from clipgraft.adapters.checkpoint import mapping, number, shown, text
from clipgraft.adapters.native import AdapterFile
from clipgraft.adapters.uniform import Weights, site_scale
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig

KEY = "clipgraft"


def extras(adapter: AdapterFile) -> dict[str, Any]:
    """The entry for `adapter`: plain values alone, so that `weights_only` opens it."""
    return {
        "base": dict(adapter.base),
        "fingerprint": adapter.fingerprint,
        "logit_scale": adapter.logit_scale,
        "metrics": dict(adapter.metrics),
        "targets": adapter.settings.targets,
        "ranks": {str(site): a.shape[0] for site, (a, _) in adapter.weights.items()},
    }


def with_extras(adapter: AdapterFile, data: Mapping[str, Any]) -> AdapterFile:
    """`adapter` as it was before it was written: its own ranks, base, temperature and metrics.

    Raises:
        AdapterError: the entry is damaged.
    """
    if KEY not in data:
        return adapter
    record = mapping(data, KEY, adapter.path)
    fingerprint, scale = record.get("fingerprint"), record.get("logit_scale")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise AdapterError(f"{adapter.path}: the fingerprint is {shown(fingerprint)}: save the adapter again")
    scale = None if scale is None else float(number(record, "logit_scale", adapter.path))
    weights, settings = _own_ranks(adapter, mapping(record, "ranks", adapter.path))
    base = mapping(record, "base", adapter.path)
    targets = text(record, "targets") or settings.targets
    return replace(
        adapter,
        weights=weights,
        settings=replace(settings, targets=targets, train_logit_scale=scale is not None),
        base={key: text(base, key) or adapter.base.get(key, "") for key in ("name", "pretrained", "family")},
        fingerprint=fingerprint,
        logit_scale=scale,
        metrics=mapping(record, "metrics", adapter.path),
    )


def _own_ranks(adapter: AdapterFile, ranks: Mapping[str, Any]) -> tuple[Weights, LoraConfig]:
    """Weights without the zeros that evened out their ranks, at the scales they had with them."""
    weights: Weights = {}
    settings = adapter.settings
    rank_pattern, alpha_pattern = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    for site, (a, b) in adapter.weights.items():
        r = ranks.get(str(site))
        if not isinstance(r, int) or not 0 < r < a.shape[0] or not _padded(a, b, r):
            weights[site] = a, b
            continue
        weights[site] = a[:r].clone(), b[:, :r].clone()
        scale = site_scale(settings, site, a.shape[0])
        rank_pattern[str(site)] = r
        alpha_pattern[str(site)] = scale * (math.sqrt(r) if settings.use_rslora else r)
    return weights, replace(settings, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def _padded(a: Tensor, b: Tensor, r: int) -> bool:
    return not (a[r:].any() or b[:, r:].any())
