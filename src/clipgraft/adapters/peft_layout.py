"""PEFT 0.21's names and shapes for LoRA over `transformers.CLIPModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.checkpoint import some
from clipgraft.adapters.peft_config import check_config, read_settings
from clipgraft.errors import AdapterError
from clipgraft.lora.state import LoraSettings
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site

_PREFIX = "base_model.model."
_EMBEDDINGS = ("token_embedding", "position_embedding")
_NAME = re.compile(
    r"(?P<path>.+?)\.(?:lora_embedding_(?P<table>[AB])|lora_(?P<part>[AB])\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|lora_B\.(?P<offset>bias)"
    r"|(?:base_layer\.)?(?P<own>weight|bias))"
)


@dataclass(frozen=True)
class Tensors:
    """What `adapter_model.safetensors` holds, by what it is for.

    Attributes:
        weights: A and B by site.
        magnitudes: (out,) of DoRA by site.
        offsets: (out,) by site, biases of B, which the scale acts on.
        biases: (out,) whole biases by the path of their module.
        full: whole weights, (out, in), of modules that were saved as they are.
    """

    weights: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    magnitudes: dict[Site, Tensor] = field(default_factory=dict)
    offsets: dict[Site, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    full: dict[Site, Tensor] = field(default_factory=dict)


def name_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """`adapter_model.safetensors`: the same under PEFT's names; offsets and whole weights are not written."""
    named: dict[str, Tensor] = {}
    for site, pair in tensors.weights.items():
        stem = f"{_PREFIX}{site_path(site)}"
        table = site.role in _EMBEDDINGS
        for part, tensor in zip("AB", pair, strict=True):
            named[f"{stem}.lora_embedding_{part}" if table else f"{stem}.lora_{part}.weight"] = tensor
    for site, magnitude in tensors.magnitudes.items():
        shaped = magnitude.view(1, -1, 1, 1) if site.role == "patch_embedding" else magnitude
        named[f"{_PREFIX}{site_path(site)}.lora_magnitude_vector"] = shaped
    adapted = {site_path(site) for site in tensors.weights}
    for path, bias in tensors.biases.items():
        named[f"{_PREFIX}{path}.{'base_layer.' if path in adapted else ''}bias"] = bias
    return named


def read_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[Tensors, LoraSettings]:
    """What the file holds, by site, and the settings that scale it.

    Raises:
        AdapterError: the configuration is of something else than LoRA, names lie outside
            transformers.CLIPModel or are not what the configuration announces, one half of a pair is missing,
            or weights and configuration disagree.
    """
    check_config(config, folder)
    found, halves, surplus = Tensors(), dict[Site, dict[str, Tensor]](), []
    for name, tensor in tensors.items():
        if not _sort(name.removeprefix(_PREFIX), tensor, config, found, halves):
            surplus.append(name)
    if surplus:
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on transformers.CLIPModel, or that "
            f"adapter_config.json does not announce: {some([repr(name) for name in surplus])}; train it on "
            "that model, or drop them"
        )
    single = [str(site) for site, parts in halves.items() if set(parts) != {"A", "B"}]
    if single or not (halves or found.full):
        raise AdapterError(
            f"{folder} lacks A or B for {some(single) or 'every site'}: it is incomplete; save it again"
        )
    found.weights.update({site: (parts["A"], parts["B"]) for site, parts in halves.items()})
    _check_whole(found, config, folder)
    return found, read_settings(found.weights, config, folder)


def _sort(
    name: str,
    tensor: Tensor,
    config: Mapping[str, Any],
    found: Tensors,
    halves: dict[Site, dict[str, Tensor]],
) -> bool:
    """Put a tensor where it belongs; False if it belongs nowhere."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    path, site = match["path"], _site_or_none(match["path"])
    if match["own"] == "bias":
        found.biases[path] = tensor
        return bool(config.get("bias") not in (None, "none"))
    if site is None:
        return False
    if match["own"] == "weight":
        found.full[site] = tensor
        return any(f".{path}".endswith(f".{kept}") for kept in config.get("modules_to_save") or ())
    if match["magnitude"]:
        found.magnitudes[site] = tensor.flatten()
        return bool(config.get("use_dora"))
    if match["offset"]:
        found.offsets[site] = tensor
        return bool(config.get("lora_bias"))
    halves.setdefault(site, {})[match["table"] or match["part"]] = tensor
    return (site.role in _EMBEDDINGS) == bool(match["table"])


def _check_whole(found: Tensors, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse adapters that lack a part which their configuration announces; PEFT only warns."""
    lacking = [f"{site} (lora_magnitude_vector)" for site in found.weights if site not in found.magnitudes]
    lacking = lacking if config.get("use_dora") else []
    if config.get("lora_bias"):
        lacking += [f"{site} (lora_B.bias)" for site in found.weights if site not in found.offsets]
    stray = [str(site) for site in (*found.magnitudes, *found.offsets) if site not in found.weights]
    twice = [str(site) for site in found.full if site in found.weights]
    for sites, fault in (
        (lacking, "lacks weights of"),
        (stray, "has magnitudes or biases, but no A and B, for"),
        (twice, "has both a whole weight and an update for"),
    ):
        if sites:
            raise AdapterError(f"{folder} {fault} {some(sites)}: it is incomplete; save it again")


def _site_or_none(path: str) -> Site | None:
    try:
        return path_site(path)
    except AdapterError:
        return None
