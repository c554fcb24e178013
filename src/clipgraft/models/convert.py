"""Convert a plain CLIP or a SigLIP between open_clip and transformers, with all that belongs to it.

The converted weights are the same bits under other names, so that both models have one fingerprint, and
their features differ by rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.models import convert_siglip
from clipgraft.models.architecture import TextTower, VisionTower
from clipgraft.models.clip import Clip, family_of
from clipgraft.models.configs import model_config
from clipgraft.models.convert_siglip import SiglipShape, TowerShape, hf_tower
from clipgraft.models.family import LARGEST_ID, is_lora
from clipgraft.models.hf import LARGEST_ID_AS_EOS
from clipgraft.models.library_calls import no_initialization, quiet_libraries
from clipgraft.models.names import SIGLIP, SIGLIP2
from clipgraft.models.processors import (
    HfPreprocess,
    HfTokenizer,
    ImageSettings,
    image_processor,
    image_settings,
    preprocess_config,
    to_hf_tokenizer,
    to_openclip_tokenizer,
    tokenizer_config,
)
from clipgraft.models.sites import TOWERS, Site, Tower

_DEFAULT_EPS, _DEFAULT_RATIO = 1e-5, 4.0


def to_transformers(clip: Clip) -> Clip:
    """An open_clip model as a new `CLIPModel` or `SiglipModel` of its type and device; others as they are.

    Raises:
        ModelError: the model carries an adapter, is neither a plain CLIP nor a SigLIP, or has a tokenizer
            or preprocessing that transformers has no counterpart of.
    """
    require_bare(clip)
    if clip.family.name == "transformers":
        return clip
    is_siglip = clip.family.twin(clip.model) is SIGLIP
    shape = convert_siglip.measure_openclip(clip.model) if is_siglip else shape_of(clip)
    settings = image_settings(clip)
    processor = None if settings is None else HfPreprocess(image_processor(settings))
    tokenizer = to_hf_tokenizer(clip)
    model = _converted(clip, _transformers_builder(shape, tokenizer))
    return replace(
        clip, model=model, family=family_of(model), tokenizer=tokenizer, preprocess=processor, notes=()
    )


def to_open_clip(clip: Clip) -> Clip:
    """A `CLIPModel` or `SiglipModel` as a new open_clip model of its type and device; others as they are.

    Raises:
        ModelError: the model carries an adapter, is neither a plain CLIP nor a SigLIP, or has a tokenizer
            or preprocessing that open_clip has no counterpart of.
    """
    require_bare(clip)
    if clip.family.name == "open_clip":
        return clip
    is_siglip = clip.family.twin(clip.model) is SIGLIP
    build = _openclip_builder(
        convert_siglip.measure_transformers(clip.model) if is_siglip else shape_of(clip)
    )
    settings = image_settings(clip)
    tokenizer = to_openclip_tokenizer(clip)
    model = _converted(clip, build)
    evaluate, train = (None, None) if settings is None else _openclip_transforms(model, settings)
    return replace(
        clip,
        model=model,
        family=family_of(model),
        tokenizer=tokenizer,
        preprocess=evaluate,
        preprocess_train=train,
        notes=(),
    )


def require_bare(clip: Clip) -> None:
    """Raise ModelError for a model that carries an adapter."""
    if any(is_lora(name) for name, _ in clip.model.named_parameters()):
        raise ModelError("this model carries an adapter: merge it, or write the adapter alone")


def _transformers_builder(
    shape: ClipShape | SiglipShape, tokenizer: HfTokenizer | None
) -> Callable[[], nn.Module]:
    from transformers import CLIPModel

    if isinstance(shape, SiglipShape):
        inner = None if tokenizer is None else tokenizer.inner
        return lambda: convert_siglip.build_transformers(shape, inner)

    config = _hf_config(shape, tokenizer)
    return lambda: CLIPModel(config)


def _openclip_builder(shape: ClipShape | SiglipShape) -> Callable[[], nn.Module]:
    import open_clip

    if isinstance(shape, SiglipShape):
        return lambda: convert_siglip.build_openclip(shape)

    config = config_of_shape(shape)
    return lambda: open_clip.CLIP(**config)


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
        text_config={**hf_tower(shape.text), "projection_dim": shape.dim, **text},
        vision_config={**hf_tower(shape.vision), "projection_dim": shape.dim, **vision},
        projection_dim=shape.dim,
    )


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

    values = preprocess_config(settings)
    config = PreprocessCfg(**values)
    set_model_preprocess_cfg(model, {**values, "mode": "RGB", "fill_color": 0})
    return image_transform_v2(config, is_train=False), image_transform_v2(config, is_train=True)


def _converted(clip: Clip, build: Callable[[], nn.Module]) -> nn.Module:
    """A new model of the other family with a clip's weights, type and device, in eval mode."""
    with no_initialization(), quiet_libraries():
        model = build()
    model.to(dtype=clip.dtype, device=clip.device)
    given = dict(clip.family.canonical_weights(clip.model))
    wanted = dict(family_of(model).canonical_weights(model))
    if odd := sorted(given.keys() ^ wanted.keys()):
        where = clip.family.name if odd[0] in given else family_of(model).name
        raise ModelError(f"only {where} has a weight {odd[0]} ({len(odd)} in all): this model has no twin")
    for name, target in wanted.items():
        value = given[name]
        # open_clip may keep its temperature as a vector of one.
        if value.shape != target.shape and not value.numel() == target.numel() == 1:
            raise ModelError(f"{name} is {tuple(value.shape)}, but its twin {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(value.reshape(target.shape))
    return model.eval()


@dataclass(frozen=True)
class ClipShape:
    """A plain CLIP model.

    Attributes:
        text, vision: the towers' transformers.
        vocabulary: number of token ids.
        context: longest text in tokens.
        pooled_id: as `Family.pooled_id` says.
        image_size, patch_size: (height, width) in pixels.
        dim: of the features.
    """

    text: TowerShape
    vision: TowerShape
    vocabulary: int
    context: int
    pooled_id: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    dim: int


def shape_of(clip: Clip) -> ClipShape:
    """Measure a model.

    Raises:
        ModelError: one of its towers is not CLIP's own transformer.
    """
    if why := why_not_plain(clip):
        name = clip.source.name or type(clip.model).__name__
        raise ModelError(f"{name} cannot leave its own family, {clip.family.name}: {why}")
    text, vision = clip.family.text_tower(clip.model), clip.family.vision_tower(clip.model)
    pooled = clip.family.pooled_id(clip.model)
    assert text is not None
    assert vision is not None
    assert pooled is not None
    refs = clip.site_refs
    return ClipShape(
        text=_tower_shape(clip, "text", text),
        vision=_tower_shape(clip, "vision", vision),
        vocabulary=refs[Site("text", None, "token_embedding")].shape[0],
        context=clip.context_length,
        pooled_id=pooled,
        image_size=clip.family.image_size(clip.model),
        patch_size=vision.patch_size,
        dim=refs[Site("text", None, "proj")].shape[0],
    )


def _tower_shape(clip: Clip, tower: Tower, parts: TextTower | VisionTower) -> TowerShape:
    block = parts.blocks[0]
    (fc1,) = block.fc1
    inner, width = fc1.weight.shape
    return TowerShape(width, len(parts.blocks), parts.heads, inner, block.act, min(_eps(clip, tower)))


def why_not_plain(clip: Clip) -> str:
    """What keeps a model from being a plain CLIP, which both libraries hold; "" for nothing."""
    family, model = clip.family, clip.model
    if missing := [tower for tower in TOWERS if tower not in clip.towers]:
        return f"it has no {missing[0]} tower"
    if family.twin(model) is SIGLIP2:
        return (
            "it takes images of any shape as patches (NaFlex), which no model of open_clip does; SigLIP 2 of "
            "one image size is a SiglipModel, which open_clip has"
        )
    towers = {"text": family.text_tower(model), "vision": family.vision_tower(model)}
    for tower in TOWERS:
        parts = towers[tower]
        if parts is None:
            return f"its {tower} tower is not CLIP's own transformer"
        if len({block.act for block in parts.blocks}) > 1 or len(_eps(clip, tower)) > 1:
            return f"activations or norm epsilons differ inside its {tower} tower"
        if Site(tower, None, "proj") not in clip.site_refs:
            return f"its {tower} tower has no projection"
    if family.pooled_id(model) is None:
        return "its text tower is not pooled at the end-of-text token"
    table = clip.site_refs[Site("text", None, "position_embedding")].shape[0]
    if table != clip.context_length:
        return f"its text tower has {table} positions for {clip.context_length} tokens"
    return ""


def _eps(clip: Clip, tower: Tower) -> set[float]:
    owned = {id(p) for group in clip.family.tower_groups(clip.model, tower) for p in group}
    norms = [module for module in clip.model.modules() if isinstance(module, nn.LayerNorm)]
    return {norm.eps for norm in norms if id(norm.weight) in owned}


def config_of(clip: Clip) -> dict[str, Any]:
    """The `model_cfg` of an open_clip model, its tokenizer's files taken to lie beside it.

    Raises:
        ModelError: the model is not a plain CLIP and the name it was loaded by does not tell either.
    """
    if why_not_plain(clip):
        try:
            return model_config(clip.source.name)
        except ModelError:
            if clip.family.twin(clip.model) is not SIGLIP:
                raise
            return convert_siglip.named_config(clip.model)
    config = config_of_shape(shape_of(clip))
    config["text_cfg"] |= tokenizer_config(clip.tokenizer)
    if clip.logit_bias is not None:
        config["init_logit_bias"] = float(clip.logit_bias.detach())
    split = getattr(clip.model, "text", None)
    if isinstance(split, nn.Module):
        config["custom_text"] = True
    owner = split if isinstance(split, nn.Module) else clip.model
    if isinstance(owner.text_projection, nn.Linear):
        config["text_cfg"]["proj_bias"] = True
    _check_config(clip.model, config)
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


def _check_config(model: nn.Module, config: dict[str, Any]) -> None:
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
