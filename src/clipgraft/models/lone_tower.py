"""One tower of CLIP alone, as image generators and LLaVA hold it: its sites, and what it cannot do.

`CLIPTextModel` and `CLIPVisionModel`, with or without projection. Adapters go on and off, are saved, loaded
and merged, and the tower encodes; whatever needs the other tower is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.encoder_sites import encoder_groups, encoder_refs, module_ref
from clipgraft.models.family import named_weights, no_plain_tower, pure_norms
from clipgraft.models.hf import set_hf_checkpointing
from clipgraft.models.names import TOWER_MODULE, Twin
from clipgraft.models.padding import hf_ends
from clipgraft.models.sites import Site, SiteRef, Tower

_TOWERS: dict[str, Tower] = {"clip_text_model": "text", "clip_vision_model": "vision"}
_PROJECTION: dict[Tower, str] = {"text": "text_projection", "vision": "visual_projection"}
_NOUNS: dict[Tower, str] = {"text": "text", "vision": "image"}
_WORDS: dict[Tower, str] = {"text": "a text", "vision": "an image"}
_SCALE = "_clipgraft_scale"
_USUAL_SCALE = math.log(1 / 0.07)


def lone_tower(model: nn.Module) -> Tower | None:
    """Which tower a model is, if it is one of CLIP's alone; else None."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return _TOWERS.get(str(kind)) if block_list(model) else None


def block_list(model: nn.Module) -> bool:
    """Whether a model holds the blocks of a tower, itself or in the module of the tower's name."""
    inner = next((getattr(model, name) for name in TOWER_MODULE.values() if hasattr(model, name)), model)
    return hasattr(getattr(inner, "encoder", None), "layers")


def check_has_tower(model: nn.Module, tower: Tower) -> None:
    """Refuse what needs the other tower of a tower alone.

    Raises:
        ModelError: the model is one, and `tower` the other.
    """
    own = lone_tower(model)
    if own not in (None, tower):
        assert own is not None
        raise ModelError(
            f"{type(model).__name__} is {_WORDS[own]} tower alone and has no {_NOUNS[tower]} tower: use "
            "the whole CLIPModel, or join it with another tower or with a table of features "
            "(clipgraft.models.DualEncoder, FeatureTable)"
        )


def unused_scale(model: nn.Module) -> nn.Parameter:
    """CLIP's initial temperature for a model without one; it is no weight of the model and never trains."""
    if not hasattr(model, _SCALE):
        scale = nn.Parameter(torch.tensor(_USUAL_SCALE), requires_grad=False)
        # Past nn.Module, which would add it to the model's weights.
        object.__setattr__(model, _SCALE, scale)
    found = getattr(model, _SCALE)
    assert isinstance(found, nn.Parameter)
    return found


class LoneTowerFamily:
    """Module paths and shortcuts of CLIP's towers alone."""

    name = "transformers"
    pooled_id = text_tower = vision_tower = staticmethod(no_plain_tower)
    set_grad_checkpointing = staticmethod(set_hf_checkpointing)

    def accepts(self, model: nn.Module) -> bool:
        return lone_tower(model) is not None

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        tower = _tower(model)
        refs = encoder_refs(model, "", tower)
        refs += module_ref(model, _PROJECTION[tower], "", Site(tower, None, "proj"))
        return {ref.site: ref for ref in refs}

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        check_has_tower(model, "vision")
        return _features(model(pixel_values=images), "image_embeds")

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        check_has_tower(model, "text")
        return _features(model(input_ids=tokens), "text_embeds")

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        check_has_tower(model, "text")
        return hf_ends(model.config, tokens)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        check_has_tower(model, "vision")
        size = model.config.image_size  # type: ignore[union-attr]
        height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
        return int(height), int(width)

    def context_length(self, model: nn.Module) -> int:
        check_has_tower(model, "text")
        return int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        if tower != _tower(model):
            return []
        return encoder_groups(model, [getattr(model, _PROJECTION[tower], None)])

    def twin(self, model: nn.Module) -> Twin:
        kind = type(model)
        return Twin(kind.__name__, kind.__module__, "text_projection", prefix=_prefix(model))

    def norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        return {f"{_prefix(model)}{name}": module for name, module in pure_norms(model).items()}

    def canonical_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_weights(model):
            yield f"{_prefix(model)}{name}", tensor


def _tower(model: nn.Module) -> Tower:
    tower = lone_tower(model)
    assert tower is not None
    return tower


def _prefix(model: nn.Module) -> str:
    """What the module paths of the model lack of those of `CLIPModel`; nothing with a projection."""
    module = TOWER_MODULE[_tower(model)]
    return "" if hasattr(model, module) else f"{module}."


def _features(output: Any, projected: str) -> Tensor:
    """The projected features where there is a projection, else what the tower pools."""
    features: Tensor | None = getattr(output, projected, None)
    pooled: Tensor = output.pooler_output if features is None else features
    return pooled
