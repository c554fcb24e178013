"""Count what LLaVA-NeXT costs (a CLIP image tower, a projector, a language model) from its configuration.

An image is cut into crops of the tower's size, as many as the grid of the configuration that fits its shape
best, beside the whole image made small (Liu et al. 2024, *LLaVA-NeXT*, "dynamic high resolution"); padding is
cut off again behind the projector. transformers' own model does all of that here, on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.hub import one_line
from clipgraft.profile.trace import Trace, trace
from clipgraft.results import Result

MODEL_TYPE = "llava_next"
LLAVA_PARTS = {
    "image tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language model": "model.language_model",
    "head": "lm_head",
}
"""What the model is made of, with the paths of transformers."""


@dataclass(frozen=True)
class LlavaTokens:
    """How much runs through each part.

    Attributes:
        crops: images of the tower's size.
        language: tokens of the language model, those of images included.
        logits: tokens whose next one is predicted.
    """

    crops: int
    language: int
    logits: int


@dataclass(frozen=True, repr=False)
class LlavaProfile(Result):
    """A LLaVA-NeXT model on one request.

    Attributes:
        tokens: how much ran through each part.
        image_size: (height, width) in pixels of the image that they come from; None if they were given.
        trace: every module.
        weight_bytes: of all weights, in the type of the configuration.
        dtype: that type.
    """

    _shows = ("tokens", "image_size", "weight_bytes", "dtype")

    tokens: LlavaTokens
    image_size: tuple[int, int] | None
    trace: Trace
    weight_bytes: int
    dtype: str


def llava_on_meta(config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build transformers' `LlavaNextForConditionalGeneration` without weights, in bf16 by default.

    Args:
        config: a `config.json`, the folder it is in, or what it holds.

    Raises:
        ModelError: it cannot be read, or is of another kind of model.
    """
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    try:
        values = config if isinstance(config, Mapping) else LlavaNextConfig.get_config_dict(config)[0]
        if values.get("model_type") != MODEL_TYPE:
            raise ModelError(
                f"{_name(config)}: model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}; give the "
                "configuration of a LLaVA-NeXT model"
            )
        settings = LlavaNextConfig.from_dict(dict(values))
        with torch.device("meta"):
            model = LlavaNextForConditionalGeneration(settings)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{_name(config)}: no LLaVA-NeXT model can be built from it: {one_line(error)}; correct it"
        ) from error
    dtype = settings.dtype if isinstance(settings.dtype, torch.dtype) else torch.bfloat16
    module: nn.Module = model.to(dtype).eval()
    return module


def llava_costs(
    model: nn.Module,
    *,
    image_size: tuple[int, int] = (480, 640),
    text_tokens: int = 64,
    tokens: LlavaTokens | None = None,
) -> LlavaProfile:
    """Count what the first pass over a request costs, before there is any cache of keys and values.

    Args:
        model: of `llava_on_meta`, or with weights, which are not read.
        image_size: (height, width) in pixels of the one image.
        text_tokens: tokens of the text around it. The last token alone is given logits.
        tokens: counts that take the place of those of an image and a text.

    Raises:
        ModelError: an image or text of no size.
    """
    if tokens is None and min(*image_size, text_tokens) < 1:
        raise ModelError(f"an image of {image_size} with {text_tokens} tokens of text: all must be 1 or more")
    counted: list[LlavaTokens] = []

    def run(twin: Any) -> None:
        if tokens is None:
            features = _image_features(twin, image_size)
            found = LlavaTokens(features[0], features[1] + text_tokens, 1)
        else:
            found = tokens
            _ = _see(twin, found.crops)
        counted.append(found)
        _read(twin, found)

    traced = trace(model, call=run)
    return LlavaProfile(
        tokens=counted[0],
        image_size=image_size if tokens is None else None,
        trace=traced,
        weight_bytes=traced.total.parameter_bytes,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _image_features(model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Run tower and projector on an image; gives the number of crops, and of tokens that are left of them."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, vision = model.config, model.config.vision_config
    crops = image_size_to_num_patches(list(image_size), config.image_grid_pinpoints, vision.image_size)
    features, _ = model.model.pack_image_features(
        [_see(model, crops)],
        [list(image_size)],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=model.model.image_newline,
    )
    return crops, len(features[0])


def _see(model: Any, crops: int) -> Tensor:
    """Projected features of each crop: (crops, tokens, width of the language model)."""
    config, vision, inner = model.config, model.config.vision_config, model.model
    pixels = torch.empty(
        crops, vision.num_channels, vision.image_size, vision.image_size, dtype=model.dtype, device="meta"
    )
    layers = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = config.vision_feature_layer
    states = layers[chosen] if isinstance(chosen, int) else torch.cat([layers[i] for i in chosen], dim=-1)
    if config.vision_feature_select_strategy == "default":
        states = states[:, 1:]
    projected: Tensor = inner.multi_modal_projector(states)
    return projected


def _read(model: Any, tokens: LlavaTokens) -> None:
    """Run the language model, and the head on its last tokens. Images take the place of embedded tokens."""
    ids = torch.empty(1, tokens.language, dtype=torch.int64, device="meta")
    embedded = model.model.language_model.embed_tokens(ids)
    # A mask that is there already: transformers would look into the numbers of ids to make one.
    mask = torch.empty(1, 1, tokens.language, tokens.language, dtype=model.dtype, device="meta")
    language = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    states = language.last_hidden_state
    model.lm_head(states[:, -tokens.logits :] if tokens.logits else states[:, :0])


def _name(config: str | Path | Mapping[str, Any]) -> str:
    return "the configuration" if isinstance(config, Mapping) else str(config)
