"""PEFT 0.21's names, shapes and configuration for LoRA over `transformers.CLIPModel`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.inject import LoraSettings
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site

_PREFIX = "base_model.model."
_EMBEDDINGS = ("token_embedding", "position_embedding")
_NAME = re.compile(r"(?P<path>.+?)\.lora_(?:embedding_(?P<table>[AB])|(?P<part>[AB])\.weight)")
_DEFAULT_R = _DEFAULT_ALPHA = 8  # PEFT's, for configurations that do not say
# What makes an adapter compute something else than W + s·B·A.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that take the initial B·A off the base, so that A and B alone do not tell the update.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def tensor_names(site: Site) -> tuple[str, str]:
    """Names of A and B in `adapter_model.safetensors`."""
    stem = f"{_PREFIX}{site_path(site)}"
    if site.role in _EMBEDDINGS:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


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
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [site_path(site) for site in ranks],
        "rank_pattern": {_exactly(site): r for site, r in ranks.items() if r != settings.r},
        "alpha_pattern": {_exactly(site): a for site, a in alphas.items() if a != settings.alpha},
    }


def _exactly(site: Site) -> str:
    """PEFT reads pattern keys as regular expressions."""
    return re.escape(site_path(site))


def read_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[dict[Site, tuple[Tensor, Tensor]], LoraSettings]:
    """A and B by site, and the settings that scale them.

    Raises:
        AdapterError: the configuration is of something else than plain LoRA, names lie outside
            transformers.CLIPModel, one half of a pair is missing, or weights and configuration disagree.
    """
    _check_config(config, folder)
    halves: dict[Site, dict[str, Tensor]] = {}
    surplus: list[str] = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        site = _site_or_none(match["path"]) if match else None
        if match is None or site is None or (site.role in _EMBEDDINGS) != bool(match["table"]):
            surplus.append(name)
        else:
            halves.setdefault(site, {})[match["table"] or match["part"]] = tensor
    if surplus:
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on transformers.CLIPModel: "
            f"{_some([repr(name) for name in surplus])}; train it on that model, or drop them"
        )
    single = [str(site) for site, parts in halves.items() if set(parts) != {"A", "B"}]
    if single or not halves:
        raise AdapterError(
            f"{folder} lacks A or B for {_some(single) or 'every site'}: it is incomplete; save it again"
        )
    weights = {site: (parts["A"], parts["B"]) for site, parts in halves.items()}
    return weights, _settings(weights, config, folder)


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


def _site_or_none(path: str) -> Site | None:
    try:
        return path_site(path)
    except AdapterError:
        return None


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is of PEFT type {config.get('peft_type')!r}: clipgraft reads 'LORA'")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise AdapterError(
            f"{folder} uses {', '.join(used)}, which clipgraft does not read: make it plain LoRA with PEFT"
        )


def _settings(
    weights: Mapping[Site, tuple[Tensor, Tensor]], config: Mapping[str, Any], folder: Path
) -> LoraSettings:
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
