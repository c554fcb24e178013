"""The same model in the other family: weights, tokenizer and preprocessing.

Only plain CLIP models have a twin. Its weights are the same bits under other names, so that both have one
fingerprint, and its features differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, family_of
from clipgraft.models.family import LARGEST_ID, is_lora
from clipgraft.models.from_hf import HfPreprocess
from clipgraft.models.hf import LARGEST_ID_AS_EOS
from clipgraft.models.inputs import (
    ImageSettings,
    image_processor,
    image_settings,
    preprocess_config,
    to_hf_tokenizer,
    to_openclip_tokenizer,
)
from clipgraft.models.openclip_config import config_of_shape
from clipgraft.models.quiet import quiet, undrawn
from clipgraft.models.shape import ClipShape, TowerShape, shape_of
from clipgraft.models.tokenizers import HfTokenizer

_HF_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_transformers(clip: Clip) -> Clip:
    """An open_clip model as a new `transformers.CLIPModel` of its type and device; others as they are.

    Raises:
        ModelError: the model carries an adapter, is not a plain CLIP, or has a tokenizer or preprocessing
            that transformers has no counterpart of.
    """
    require_bare(clip)
    if clip.family.name == "transformers":
        return clip
    from transformers import CLIPModel

    shape = shape_of(clip)
    settings = image_settings(clip)
    processor = None if settings is None else HfPreprocess(image_processor(settings))
    tokenizer = to_hf_tokenizer(clip)
    config = _hf_config(shape, tokenizer)
    model = _twin(clip, lambda: CLIPModel(config))
    return Clip(model, family_of(model), tokenizer, processor, clip.preprocess_train, clip.source)


def to_open_clip(clip: Clip) -> Clip:
    """A `transformers.CLIPModel` as a new `open_clip.CLIP` of its type and device; others as they are.

    Raises:
        ModelError: the model carries an adapter, is not a plain CLIP, or has a tokenizer or preprocessing
            that open_clip has no counterpart of.
    """
    require_bare(clip)
    if clip.family.name == "open_clip":
        return clip
    import open_clip

    config = config_of_shape(shape_of(clip))
    settings = image_settings(clip)
    tokenizer = to_openclip_tokenizer(clip)
    model = _twin(clip, lambda: open_clip.CLIP(**config))
    evaluate = train = None
    if settings is not None:
        evaluate, train = _openclip_transforms(model, settings)
    return Clip(model, family_of(model), tokenizer, evaluate, train, clip.source)


def require_bare(clip: Clip) -> None:
    """Raise ModelError for a model that carries an adapter."""
    if any(is_lora(name) for name, _ in clip.model.named_parameters()):
        raise ModelError("this model carries an adapter: merge it, or write the adapter alone")


def _hf_config(shape: ClipShape, tokenizer: HfTokenizer | None) -> Any:
    from transformers import CLIPConfig

    if shape.image_size[0] != shape.image_size[1] or shape.patch_size[0] != shape.patch_size[1]:
        raise ModelError(
            f"images of {shape.image_size} pixels in patches of {shape.patch_size}: transformers.CLIPModel "
            "takes squares only; keep the model in the open_clip form"
        )
    inner = tokenizer.inner if tokenizer is not None else None
    text = {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "bos_token_id": getattr(inner, "bos_token_id", None),
        "eos_token_id": _hf_eos(shape, getattr(inner, "eos_token_id", None)),
        "pad_token_id": getattr(inner, "pad_token_id", None),
    }
    vision = {"image_size": shape.image_size[0], "patch_size": shape.patch_size[0]}
    return CLIPConfig(
        text_config={**_hf_tower(shape.text, shape.dim), **text},
        vision_config={**_hf_tower(shape.vision, shape.dim), **vision},
        projection_dim=shape.dim,
    )


def _hf_tower(tower: TowerShape, dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.inner,
        "projection_dim": dim,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": _HF_ACT[tower.act],
        "layer_norm_eps": tower.eps,
    }


def _hf_eos(shape: ClipShape, tokenizers: int | None) -> int:
    """The `eos_token_id` at which transformers pools where open_clip does."""
    if shape.pooled_id == LARGEST_ID:
        return shape.vocabulary - 1 if tokenizers == shape.vocabulary - 1 else LARGEST_ID_AS_EOS
    if shape.pooled_id == LARGEST_ID_AS_EOS:
        raise ModelError(
            f"its end-of-text token is {LARGEST_ID_AS_EOS}, which transformers.CLIPModel takes for the "
            "largest id: keep the model in the open_clip form"
        )
    return shape.pooled_id


def _openclip_transforms(model: nn.Module, settings: ImageSettings) -> tuple[Any, Any]:
    """Record the settings on the model as open_clip does, and make both its transforms."""
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**preprocess_config(settings))
    set_model_preprocess_cfg(model, {**preprocess_config(settings), "mode": "RGB", "fill_color": 0})
    return image_transform_v2(config, is_train=False), image_transform_v2(config, is_train=True)


def _twin(clip: Clip, build: Callable[[], nn.Module]) -> nn.Module:
    """A new model of the other family with a clip's weights, type and device, in eval mode."""
    with undrawn(), quiet():
        model = build()
    model.to(dtype=clip.dtype, device=clip.device)
    given = dict(clip.family.canonical_weights(clip.model))
    wanted = dict(family_of(model).canonical_weights(model))
    if odd := sorted(given.keys() ^ wanted.keys()):
        where = clip.family.name if odd[0] in given else family_of(model).name
        raise ModelError(f"only {where} has a weight {odd[0]} ({len(odd)} in all): this model has no twin")
    for name, weight in wanted.items():
        _put(name, weight, given[name])
    return model.eval()


def _put(name: str, target: Tensor, value: Tensor) -> None:
    # open_clip may keep its temperature as a vector of one.
    if value.numel() == target.numel() == 1:
        value = value.reshape(target.shape)
    if value.shape != target.shape:
        raise ModelError(f"{name} is {tuple(value.shape)}, but its twin {tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(value)
