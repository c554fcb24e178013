"""PEFT's `adapter_config.json`: how it is written, and what it says of ranks, scales and options."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.state import LoraSettings
from clipgraft.models.hf import site_path
from clipgraft.models.sites import Site

_DEFAULT_R = _DEFAULT_ALPHA = 8  # PEFT's, for configurations that do not say
# What makes an adapter compute something else than this package does.
_UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that take the initial B·A off the base, so that A and B alone do not tell the update; of
# these only plain PiSSA can be computed again.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_json(
    settings: LoraSettings, ranks: Mapping[Site, int], alphas: Mapping[Site, float], base_name: str
) -> dict[str, Any]:
    """`adapter_config.json`: what stock PEFT needs to rebuild these very layers."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name.removeprefix("hf:") or None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [site_path(site) for site in ranks],
        "rank_pattern": {_exactly(site): r for site, r in ranks.items() if r != settings.r},
        "alpha_pattern": {_exactly(site): a for site, a in alphas.items() if a != settings.alpha},
    }


def _exactly(site: Site) -> str:
    """PEFT reads pattern keys as regular expressions."""
    return re.escape(site_path(site))


def missing_sites(config: Mapping[str, Any], present: Iterable[Site], sites: Iterable[Site]) -> list[Site]:
    """Sites of a model that the configuration targets and the weights lack, in the towers that they adapt.

    PEFT only warns of them. Patterns and layer selections are not worked out: they count as complete.
    """
    targets = config.get("target_modules")
    selective = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or selective:
        return []
    there = set(present)
    towers = {site.tower for site in there}
    return [
        site
        for site in sites
        if site not in there
        and site.tower in towers
        and any(f".{site_path(site)}".endswith(f".{target}") for target in targets)
    ]


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what computes otherwise than A, B and this package's options tell; raises AdapterError."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is of PEFT type {config.get('peft_type')!r}: clipgraft reads 'LORA'")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias") not in (None, "none", "lora_only", "all"):
        used.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE) and start != "pissa":
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise AdapterError(
            f"{folder} uses {', '.join(used)}, which clipgraft does not read: make it plain LoRA with PEFT"
        )


def site_ranks(settings: LoraSettings, sites: Iterable[Site]) -> dict[Site, int]:
    """Ranks of sites whose settings are exact: with patterns by `str(site)`."""
    return {site: settings.rank_pattern.get(str(site), settings.r) for site in sites}


def site_alphas(settings: LoraSettings, sites: Iterable[Site]) -> dict[Site, float]:
    """Alphas of sites, likewise."""
    return {site: float(settings.alpha_pattern.get(str(site), settings.alpha)) for site in sites}


def read_settings(
    weights: Mapping[Site, tuple[Tensor, Tensor]], config: Mapping[str, Any], folder: Path
) -> LoraSettings:
    """The settings that scale A and B; raises AdapterError if they do not fit them."""
    default_r = int(_number(config, "r", _DEFAULT_R, folder))
    default_alpha = _number(config, "lora_alpha", _DEFAULT_ALPHA, folder)
    alpha_pattern = _pattern(config, "alpha_pattern", folder)
    alphas = {site: _by_pattern(site, alpha_pattern, default_alpha) for site in weights}
    rank_pattern = _pattern(config, "rank_pattern", folder)
    ranks = {site: int(_by_pattern(site, rank_pattern, default_r)) for site in weights}
    for site, (a, b) in weights.items():
        if a.ndim < 2 or b.ndim < 2 or not a.shape[0] == b.shape[1] == ranks[site]:
            raise AdapterError(
                f"{folder}: {site} has A {tuple(a.shape)}, B {tuple(b.shape)} where the configuration says "
                f"rank {ranks[site]}: the files are of two adapters; copy them together again"
            )
    return LoraSettings(
        r=default_r,
        alpha=default_alpha,
        dropout=_number(config, "lora_dropout", 0.0, folder),
        targets=",".join(map(str, weights)),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={str(site): r for site, r in ranks.items() if r != default_r},
        alpha_pattern={str(site): a for site, a in alphas.items() if a != default_alpha},
        use_dora=bool(config.get("use_dora")),
        bias="lora_only" if config.get("lora_bias") else config.get("bias") or "none",
    )


def _number(config: Mapping[str, Any], key: str, default: float, folder: Path) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{folder}: {key!r} is {value!r} where a number belongs: save the adapter again")
    return value


def _pattern(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, float]:
    """A rank or alpha pattern whose keys are regular expressions and whose values are numbers."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{folder}: {key} is no JSON object: save the adapter again")
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            raise AdapterError(f"{folder}: {key} key {expression!r} is no pattern: {error}") from error
    return {name: _number(pattern, name, 0, folder) for name in pattern}


_N = TypeVar("_N", int, float)


def _by_pattern(site: Site, pattern: Mapping[str, _N], default: _N) -> _N:
    """PEFT's own rule: the first pattern key that matches the end of the module path."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", site_path(site)):
            return value
    return default


def some(names: Iterable[object], most: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
