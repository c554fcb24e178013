"""Models of two towers of the user's own, `DualEncoder` or any with its attributes: sites and names."""

from __future__ import annotations

from typing import Any

import PIL.Image
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.encoder_sites import PLACES, encoder_groups, encoder_refs, module_ref
from clipgraft.models.family import named_weights, no_plain_tower, pure_norms
from clipgraft.models.hf import set_hf_checkpointing
from clipgraft.models.names import Twin, own_twin
from clipgraft.models.padding import longest
from clipgraft.models.processors import OWN_TOWERS
from clipgraft.models.sites import TOWERS, Site, SiteRef, Tower

_REQUIRED = ("vision_tower", "text_tower", "logit_scale", "encode_image", "encode_text")
# What towers of transformers project with themselves.
_INNER = {"text": "text_tower.text_projection", "vision": "vision_tower.visual_projection"}
_USUAL_SIZE = (224, 224)


class OwnTowersFamily:
    """Module paths and shortcuts of models that follow `OwnTowers`."""

    name = OWN_TOWERS
    pooled_id = text_tower = vision_tower = staticmethod(no_plain_tower)
    norms = staticmethod(pure_norms)
    canonical_weights = staticmethod(named_weights)

    def accepts(self, model: nn.Module) -> bool:
        return all(hasattr(model, name) for name in _REQUIRED)

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        places = getattr(model, "places", PLACES)
        refs: list[SiteRef] = []
        for tower in TOWERS:
            path = f"{tower}_tower"
            refs += encoder_refs(model.get_submodule(path), path, tower, places)
            for projection in (_INNER[tower], f"{tower}_projection"):
                refs += module_ref(model, projection, "", Site(tower, None, "proj"))
        return {ref.site: ref for ref in sorted(refs, key=lambda ref: ref.site.order)}

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        features: Tensor = model.encode_image(images)  # type: ignore[operator]
        return features

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        features: Tensor = model.encode_text(tokens)  # type: ignore[operator]
        return features

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        told = getattr(model, "text_ends", None)
        ends: Tensor | None = None if told is None else told(tokens)
        return ends

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        preprocess = getattr(model, "preprocess", None)
        if preprocess is None:
            return _USUAL_SIZE
        height, width = preprocess(PIL.Image.new("RGB", (9, 8))).shape[-2:]
        return int(height), int(width)

    def context_length(self, model: nn.Module) -> int:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            return int(tokenizer(["a"]).shape[1])
        return longest(getattr(model.text_tower, "config", None))

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        projection: Any = getattr(model, f"{tower}_projection", None)
        return encoder_groups(model.get_submodule(f"{tower}_tower"), [projection])

    def set_grad_checkpointing(self, model: nn.Module, enable: bool) -> None:
        for tower in TOWERS:
            owner = model.get_submodule(f"{tower}_tower")
            if not hasattr(owner, "gradient_checkpointing_enable"):
                raise ModelError(
                    f"`grad_checkpointing`: the {tower} tower is {type(owner).__name__}, which has no "
                    "gradient_checkpointing_enable as models of transformers do; drop it"
                )
            set_hf_checkpointing(owner, enable)

    def twin(self, model: nn.Module) -> Twin:
        return own_twin(model, self.site_refs(model))
