"""transformers' models of two towers that are not CLIP's: AltCLIP, ChineseCLIP and VisionTextDualEncoder.

They read text with XLM-R, BERT or any other encoder. Those attend to their padding unless a mask hides it,
which is made of the ids here; a causal text tower, as of CLIP, needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from clipgraft.models.encoder_sites import encoder_groups, encoder_refs, module_ref
from clipgraft.models.family import named_weights, no_plain_tower, pure_norms
from clipgraft.models.hf import HfFamily, set_hf_checkpointing
from clipgraft.models.names import TOWER_MODULE, Twin, own_twin
from clipgraft.models.padding import hf_ends, hf_mask, longest
from clipgraft.models.sites import Site, SiteRef, Tower

MODEL_TYPES = ("altclip", "chinese_clip", "vision-text-dual-encoder")
_PROJECTIONS = {
    "text_model.transformation": Site("text", None, "proj_fc1"),  # of AltCLIP
    "text_projection": Site("text", None, "proj"),
    "visual_projection": Site("vision", None, "proj"),
}
# transformers builds these poolers, and the model reads the first token instead.
_NOT_POOLED = ("altclip", "chinese_clip")


class VisionTextFamily:
    """Module paths and shortcuts of `AltCLIPModel`, `ChineseCLIPModel` and `VisionTextDualEncoderModel`."""

    name = "transformers"
    pooled_id = text_tower = vision_tower = staticmethod(no_plain_tower)
    set_grad_checkpointing = staticmethod(set_hf_checkpointing)
    norms = staticmethod(pure_norms)
    canonical_weights = staticmethod(named_weights)

    def accepts(self, model: nn.Module) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return kind in MODEL_TYPES and hasattr(model, "get_text_features") and hasattr(model, "logit_scale")

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        refs = [*_tower_refs(model, "text"), *_tower_refs(model, "vision")]
        for path, site in _PROJECTIONS.items():
            refs += module_ref(model, path, "", site)
        return {ref.site: ref for ref in sorted(refs, key=lambda ref: ref.site.order)}

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        return _pooled(model.get_image_features(pixel_values=images))  # type: ignore[operator]

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        mask = hf_mask(model.config.text_config, tokens)  # type: ignore[union-attr]
        return _pooled(model.get_text_features(input_ids=tokens, attention_mask=mask))  # type: ignore[operator]

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        return hf_ends(model.config.text_config, tokens)  # type: ignore[union-attr]

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        return HfFamily().image_size(model)

    def context_length(self, model: nn.Module) -> int:
        return longest(model.config.text_config)  # type: ignore[union-attr]

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        projection = model.get_submodule("text_projection" if tower == "text" else "visual_projection")
        return encoder_groups(model.get_submodule(TOWER_MODULE[tower]), [projection])

    def twin(self, model: nn.Module) -> Twin:
        return own_twin(model, self.site_refs(model))


def _tower_refs(model: Any, tower: Tower) -> Iterator[SiteRef]:
    path = TOWER_MODULE[tower]
    for ref in encoder_refs(model.get_submodule(path), path, tower):
        unused = ref.site.role.startswith("pool_") and model.config.model_type in _NOT_POOLED
        if not unused:
            yield ref


def _pooled(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
