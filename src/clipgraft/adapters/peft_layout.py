"""PEFT 0.21's names, shapes and configuration for LoRA over `transformers.CLIPModel`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.inject import LoraSettings
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site

_PREFIX = "base_model.model."
_EMBEDDINGS = ("token_embedding", "position_embedding")
_NAME = re.compile(r"(?P<path>.+?)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?$")
_UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias")


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
            transformers.CLIPModel, or one half of a pair is missing.
    """
    _check_config(config, folder)
    halves: dict[Site, dict[str, Tensor]] = {}
    surplus: list[str] = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            surplus.append(name)
            continue
        try:
            halves.setdefault(path_site(match["path"]), {})[match["part"]] = tensor
        except AdapterError:
            surplus.append(name)
    if surplus:
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on transformers.CLIPModel: "
            f"{', '.join(sorted(surplus)[:4])}"
        )
    single = [str(site) for site, parts in halves.items() if set(parts) != {"A", "B"}]
    if single or not halves:
        raise AdapterError(
            f"{folder} lacks A or B for {', '.join(single[:4]) or 'every site'}: it is incomplete"
        )
    weights = {site: (parts["A"], parts["B"]) for site, parts in halves.items()}
    return weights, _settings(weights, config)


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder} is a {config.get('peft_type') or 'foreign'} adapter: clipgraft reads LoRA"
        )
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if used:
        raise AdapterError(f"{folder} uses {', '.join(used)}, which this version of clipgraft does not read")


def _settings(weights: Mapping[Site, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> LoraSettings:
    ranks = {site: int(a.shape[0]) for site, (a, _) in weights.items()}
    default_r = int(config.get("r") or Counter(ranks.values()).most_common(1)[0][0])
    default_alpha = float(config.get("lora_alpha") or default_r)
    alphas = {site: _alpha_of(site, config, default_alpha) for site in weights}
    return LoraSettings(
        r=default_r,
        alpha=default_alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=",".join(map(str, weights)),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={str(site): r for site, r in ranks.items() if r != default_r},
        alpha_pattern={str(site): a for site, a in alphas.items() if a != default_alpha},
    )


def _alpha_of(site: Site, config: Mapping[str, Any], default: float) -> float:
    """PEFT's own rule: the first pattern key that matches the end of the module path."""
    for key, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", site_path(site)):
            return float(alpha)
    return default
