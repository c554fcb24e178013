"""Configurations of open_clip models: measured from a plain model, looked up by name for others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip
from clipgraft.models.family import LARGEST_ID
from clipgraft.models.from_openclip import model_config
from clipgraft.models.inputs import tokenizer_config
from clipgraft.models.shape import ClipShape, TowerShape, is_plain, shape_of

_DEFAULT_EPS, _DEFAULT_RATIO = 1e-5, 4.0


def config_of(clip: Clip) -> dict[str, Any]:
    """The `model_cfg` of an open_clip model, its tokenizer's files taken to lie beside it.

    Raises:
        ModelError: the model is not a plain CLIP and the name it was loaded by does not tell either.
    """
    if not is_plain(clip):
        return model_config(clip.source.name)
    config = config_of_shape(shape_of(clip))
    config["text_cfg"] |= tokenizer_config(clip.tokenizer)
    bias = clip.family.logit_bias(clip.model)
    if bias is not None:
        config["init_logit_bias"] = float(bias.detach())
    split = getattr(clip.model, "text", None)
    if isinstance(split, nn.Module):
        config["custom_text"] = True
    owner = split if isinstance(split, nn.Module) else clip.model
    if isinstance(owner.text_projection, nn.Linear):
        config["text_cfg"]["proj_bias"] = True
    _check(clip.model, config)
    return config


def config_of_shape(shape: ClipShape) -> dict[str, Any]:
    """What `open_clip.CLIP` is built from (its `model_cfg`); raises ModelError if it cannot be."""
    quick = {tower.act == "quick_gelu" for tower in (shape.text, shape.vision)}
    if len(quick) > 1:
        raise ModelError("one tower uses QuickGELU and the other GELU, which open_clip has no setting for")
    square = shape.image_size[0] == shape.image_size[1]
    patch = shape.patch_size
    text: dict[str, Any] = {
        "context_length": shape.context,
        "vocab_size": shape.vocabulary,
        "width": shape.text.width,
        "heads": shape.text.heads,
        "layers": shape.text.layers,
        **_openclip_extras(shape.text),
    }
    if shape.pooled_id not in (LARGEST_ID, shape.vocabulary - 1):
        text |= {"pool_type": "eos", "eos_id": shape.pooled_id}
    vision = {
        "image_size": shape.image_size[0] if square else list(shape.image_size),
        "layers": shape.vision.layers,
        "width": shape.vision.width,
        "head_width": shape.vision.width // shape.vision.heads,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        **_openclip_extras(shape.vision),
    }
    return {"embed_dim": shape.dim, "quick_gelu": quick == {True}, "vision_cfg": vision, "text_cfg": text}


def _openclip_extras(tower: TowerShape) -> dict[str, Any]:
    """Settings of a tower that are not open_clip's defaults."""
    extras: dict[str, Any] = {}
    ratio = tower.inner / tower.width
    if ratio != _DEFAULT_RATIO:
        # open_clip rounds width·ratio down, which may end one below.
        exact = int(tower.width * ratio) == tower.inner
        extras["mlp_ratio"] = ratio if exact else math.nextafter(ratio, math.inf)
    if tower.act == "gelu_tanh":
        extras["act_kwargs"] = {"approximate": "tanh"}
    if tower.eps != _DEFAULT_EPS:
        extras["norm_kwargs"] = {"eps": tower.eps}
    return extras


def _check(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ModelError where open_clip would build a model of other weights than the one measured."""
    import open_clip

    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with torch.device("meta"):
        built = kind(**{name: value for name, value in config.items() if name != "custom_text"})
    given = {name: weight.numel() for name, weight in model.state_dict().items()}
    wanted = {name: weight.numel() for name, weight in built.state_dict().items()}
    if odd := sorted(given.items() ^ wanted.items()):
        raise ModelError(
            f"open_clip has no configuration for a model with {odd[0][0]} like this one's: write a "
            "checkpoint (.pt), which needs none"
        )
