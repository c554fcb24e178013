"""SigLIP measured in either library and built in the other one, for `clipgraft.models.convert`."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.models.architecture import Activation, activation_of

_HF_ACT: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
}
_TIMM_MODEL = "vit_base_patch16_siglip_224"


@dataclass(frozen=True)
class TowerShape:
    """The transformer of a tower; `inner` is the width inside its MLPs, `eps` that of all its norms."""

    width: int
    layers: int
    heads: int
    inner: int
    act: Activation
    eps: float


@dataclass(frozen=True)
class SiglipShape:
    """A SigLIP model: its towers, the text's vocabulary, context and features, the image and patch sides."""

    text: TowerShape
    vision: TowerShape
    vocabulary: int
    context: int
    dim: int
    image_size: int
    patch_size: int


def measure_openclip(model: nn.Module) -> SiglipShape:
    """Measure an open_clip SigLIP; raises ModelError where `SiglipModel` has no setting for what it finds."""
    text: Any = model.text
    trunk: Any = model.visual.trunk  # type: ignore[union-attr]
    pool, patch = trunk.attn_pool, trunk.patch_embed.proj
    texts = [(b.attn.num_heads, b.mlp.c_fc, b.mlp.gelu, (b.ln_1, b.ln_2)) for b in text.transformer.resblocks]
    images = [(b.attn.num_heads, b.mlp.fc1, b.mlp.act, (b.norm1, b.norm2)) for b in trunk.blocks]
    head = (pool.num_heads, pool.mlp.fc1, pool.mlp.act, (pool.norm,))
    height, width = model.visual.image_size  # type: ignore[union-attr, misc]
    vocabulary = text.token_embedding.weight.shape[0]
    if height != width or patch.kernel_size[0] != patch.kernel_size[1]:
        raise ModelError("its images or patches are no squares, which transformers.SiglipModel takes alone")
    return SiglipShape(
        text=_tower(len(texts), texts, text.ln_final, "text"),
        vision=_tower(len(images), [*images, head], trunk.norm, "vision"),
        vocabulary=vocabulary,
        context=int(text.context_length),
        dim=text.text_projection.out_features,
        image_size=int(height),
        patch_size=patch.kernel_size[0],
    )


def measure_transformers(model: nn.Module) -> SiglipShape:
    """Measure a `SiglipModel`."""
    text, vision = model.text_model, model.vision_model
    tower: Any
    towers = {}
    for name, tower in (("text", text), ("vision", vision)):
        layers = [
            (x.self_attn.num_heads, x.mlp.fc1, x.mlp.activation_fn, (x.layer_norm1, x.layer_norm2))
            for x in tower.encoder.layers
        ]
        last = tower.final_layer_norm if name == "text" else tower.post_layernorm
        towers[name] = _tower(len(layers), layers, last, name)
    config: Any = model.config
    return SiglipShape(
        text=towers["text"],
        vision=towers["vision"],
        vocabulary=config.text_config.vocab_size,
        context=config.text_config.max_position_embeddings,
        dim=config.text_config.projection_size,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
    )


def _tower(layers: int, parts: list[Any], last: Any, name: str) -> TowerShape:
    """The common measure of all MLPs and norms of a tower."""
    heads, inner = {part[0] for part in parts}, {part[1].out_features for part in parts}
    acts = {activation_of(part[2]) for part in parts}
    eps = {norm.eps for part in parts for norm in part[3]} | {last.eps}
    if len(heads) > 1 or len(inner) > 1 or len(acts) > 1 or len(eps) > 1 or None in acts:
        raise ModelError(
            f"heads, MLPs or norms differ inside its {name} tower, which transformers.SiglipModel and "
            "open_clip have no setting for: keep the model in its form"
        )
    act = acts.pop()
    assert act is not None
    return TowerShape(parts[0][1].in_features, layers, heads.pop(), inner.pop(), act, eps.pop())


def build_transformers(shape: SiglipShape, tokenizer: Any) -> nn.Module:
    """A new `SiglipModel`; `tokenizer` is transformers' or None, for the ids of its special tokens."""
    from transformers import SiglipConfig, SiglipModel

    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "projection_size": shape.dim,
        **ids,
    }
    vision = {"image_size": shape.image_size, "patch_size": shape.patch_size}
    config = SiglipConfig(
        text_config={**hf_tower(shape.text), **text}, vision_config={**hf_tower(shape.vision), **vision}
    )
    model: nn.Module = SiglipModel(config)
    return model


def hf_tower(tower: TowerShape) -> dict[str, Any]:
    """The settings of a tower's transformer in a configuration of transformers."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.inner,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": _HF_ACT[tower.act],
        "layer_norm_eps": tower.eps,
    }


def build_openclip(shape: SiglipShape) -> nn.Module:
    """A new `open_clip.CustomTextCLIP` around a SigLIP tower of timm, of any size."""
    import open_clip
    import timm

    if shape.text.act == "quick_gelu" or shape.vision.act == "quick_gelu":
        raise ModelError("it uses QuickGELU, which open_clip's SigLIP has no setting for")
    text, vision = shape.text, shape.vision
    text_config = {
        "context_length": shape.context,
        "vocab_size": shape.vocabulary,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": _ratio(text),
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text.eps},
        **({"act_kwargs": {"approximate": "tanh"}} if text.act == "gelu_tanh" else {}),
    }
    small = {"image_size": shape.image_size, "patch_size": shape.patch_size, "width": 64, "layers": 1}
    model: nn.Module = open_clip.CustomTextCLIP(shape.dim, small, text_config, init_logit_bias=0.0)
    with torch.device("meta"):  # timm has no settings for its size, so that its trunk is made beside
        visual = open_clip.timm_model.TimmModel(_TIMM_MODEL, shape.dim, shape.image_size, "map", "none")
    visual.trunk = timm.create_model(
        _TIMM_MODEL,
        num_classes=0,
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.heads,
        mlp_ratio=_ratio(vision),
        act_layer=vision.act,
        norm_layer=partial(nn.LayerNorm, eps=vision.eps),
    )
    model.visual = visual
    return model


def _ratio(tower: TowerShape) -> float:
    """The MLP ratio that libraries round down to the width inside."""
    ratio = tower.inner / tower.width
    return ratio if int(tower.width * ratio) == tower.inner else math.nextafter(ratio, math.inf)


def named_config(model: nn.Module) -> dict[str, Any]:
    """The `model_cfg` of open_clip's own SigLIP that is built as a model is.

    Raises:
        ModelError: there is none of its sizes.
    """
    import open_clip

    shape = measure_openclip(model)
    for name in open_clip.list_models():
        config: dict[str, Any] = open_clip.get_model_config(name)
        text, vision = config["text_cfg"], config["vision_cfg"]
        sizes = (vision.get("image_size"), text.get("vocab_size"), text.get("width"), config["embed_dim"])
        if sizes != (shape.image_size, shape.vocabulary, shape.text.width, shape.dim):
            continue
        if not config.get("custom_text") or vision.get("timm_pool") != "map" or "hf_model_name" in text:
            continue
        kept = {key: value for key, value in config.items() if key != "custom_text"}
        with torch.device("meta"):
            built = open_clip.CustomTextCLIP(**copy.deepcopy(kept))
        if hasattr(built.visual.trunk, "attn_pool") and measure_openclip(built) == shape:
            return config
    raise ModelError(
        "open_clip has no SigLIP of these sizes in its list, and no settings for others: write a checkpoint "
        "(.pt), which needs none, or keep the model in the transformers form"
    )
