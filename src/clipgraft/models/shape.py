"""The measures of a plain CLIP model: all that its configuration in either library is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from clipgraft.errors import ModelError
from clipgraft.models.anatomy import Activation, TextTower, VisionTower
from clipgraft.models.clip import Clip
from clipgraft.models.sites import TOWERS, Site, Tower


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


def is_plain(clip: Clip) -> bool:
    """Whether both towers are CLIP's own transformers, which either library can hold."""
    return not _why_not_plain(clip)


def shape_of(clip: Clip) -> ClipShape:
    """Measure a model.

    Raises:
        ModelError: one of its towers is not CLIP's own transformer.
    """
    if why := _why_not_plain(clip):
        name = clip.source.name or type(clip.model).__name__
        raise ModelError(f"{name} cannot leave its own family, {clip.family.name}: {why}")
    text, vision = clip.family.text_tower(clip.model), clip.family.vision_tower(clip.model)
    pooled = clip.family.pooled_id(clip.model)
    assert text is not None
    assert vision is not None
    assert pooled is not None
    refs = clip.site_refs
    projection = refs[Site("text", None, "proj")]
    return ClipShape(
        text=_tower_shape(clip, "text", text),
        vision=_tower_shape(clip, "vision", vision),
        vocabulary=refs[Site("text", None, "token_embedding")].shape[0],
        context=clip.context_length,
        pooled_id=pooled,
        image_size=clip.family.image_size(clip.model),
        patch_size=vision.patch_size,
        dim=projection.shape[0],
    )


def _tower_shape(clip: Clip, tower: Tower, parts: TextTower | VisionTower) -> TowerShape:
    block = parts.blocks[0]
    (fc1,) = block.fc1
    inner, width = fc1.weight.shape
    return TowerShape(width, len(parts.blocks), parts.heads, inner, block.act, min(_eps(clip, tower)))


def _why_not_plain(clip: Clip) -> str:
    """What keeps a model from being held by the other library, "" for nothing."""
    family, model = clip.family, clip.model
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
