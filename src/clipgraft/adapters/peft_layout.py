"""PEFT 0.21's names and shapes for LoRA over `transformers.CLIPModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.checkpoint import some
from clipgraft.adapters.peft_config import check_config, read_settings
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site

_PREFIX = "base_model.model."
_BARE = ("encoder.", "embeddings.", "final_layer_norm.", "post_layernorm.", "pre_layrnorm.")
_TEXT, _VISION = "text_model.", "vision_model."
_TOWER_CLASSES = {
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "CLIPTextTransformer": _TEXT,
    "CLIPVisionModel": _VISION,
    "CLIPVisionModelWithProjection": _VISION,
    "CLIPVisionTransformer": _VISION,
    "CLIPForImageClassification": _VISION,
}
# Modules that one tower has and the other has not.
_OWN_MODULES = {
    _TEXT: ("embeddings.token_embedding.", "final_layer_norm."),
    _VISION: (
        "embeddings.patch_embedding.",
        "embeddings.class_embedding",
        "post_layernorm.",
        "pre_layrnorm.",
    ),
}
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


def tower_prefix(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> str:
    """What the module paths of one tower alone lack of those of `CLIPModel`; "" where they lack nothing.

    Since transformers 5 the modules of `CLIPTextModel` and `CLIPVisionModel` have no inner prefix, so that
    their adapters say `encoder.layers.0…`, and only the configuration tells whose.

    Raises:
        AdapterError: it does not tell.
    """
    names = [name.removeprefix(_PREFIX) for name in tensors]
    if not any(name.startswith(_BARE) for name in names):
        return ""
    auto = config.get("auto_mapping")
    kind = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    if kind in _TOWER_CLASSES:
        return _TOWER_CLASSES[kind]
    for prefix, own in _OWN_MODULES.items():
        if any(name.startswith(own) for name in names):
            return prefix
    raise AdapterError(
        f"{folder} is of one tower alone, and adapter_config.json does not say which: add to it "
        '"auto_mapping": {"base_model_class": "CLIPTextModel"} or "CLIPVisionModel", whichever it was made on'
    )


def read_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, prefix: str = ""
) -> tuple[Tensors, LoraConfig]:
    """What the file holds, by site, and the settings that scale it; `prefix` as `tower_prefix` says.

    Raises:
        AdapterError: the configuration is of something else than LoRA, names lie outside
            transformers.CLIPModel or are not what the configuration announces, one half of a pair is missing,
            or weights and configuration disagree.
    """
    check_config(config, folder)
    found, halves, surplus = Tensors(), dict[Site, dict[str, Tensor]](), []
    for name, tensor in tensors.items():
        bare = name.removeprefix(_PREFIX)
        bare = f"{prefix}{bare}" if prefix and bare.startswith(_BARE) else bare
        if not _sort(bare, tensor, config, found, halves):
            surplus.append(name)
    if surplus:
        _check_saved(surplus, config, folder)
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
    return found, read_settings(found.weights, config, folder, prefix)


def _check_saved(surplus: Sequence[str], config: Mapping[str, Any], folder: Path) -> None:
    """Say of whole modules that `modules_to_save` announces, such as layer norms, that they are not read."""
    kept = config.get("modules_to_save")
    kept = [name for name in kept if isinstance(name, str)] if isinstance(kept, list) else []
    paths = [name.removeprefix(_PREFIX).rpartition(".")[0] for name in surplus]
    saved = [path for path in paths if any(f".{path}.".find(f".{name}.") >= 0 for name in kept)]
    if saved:
        raise AdapterError(
            f"{folder} holds whole modules that its modules_to_save announces, {some(dict.fromkeys(saved))}: "
            "of those clipgraft reads linear layers and embeddings alone, and no layer norms; merge it "
            "with PEFT (merge_and_unload()) and use the model, or train it without them"
        )


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
