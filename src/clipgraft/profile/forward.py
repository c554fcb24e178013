"""Count what a CLIP model costs to run: its towers, every site, and an adapter beside the base.

An adapter is counted as its products beside x·W, as it is trained. Without gradients `nn.MultiheadAttention`
gets W + B·A instead, folded anew for each call: out·in·r a site, whatever the batch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.lora.control import disable_lora
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import base_parameter, is_lora
from clipgraft.models.hub import one_line
from clipgraft.models.sites import Site, SiteRef, Tower
from clipgraft.profile.trace import LayerCost, Product, Trace, join, on_meta, trace
from clipgraft.results import Result
from clipgraft.text_tables import Table


@dataclass(frozen=True)
class SiteCost:
    """One site.

    Attributes:
        site: the site.
        parameters: of its weight, without bias.
        macs: multiply-adds of the product with its weight; of a fused one, an equal share. Tables have none.
        adapter_parameters: of the update that acts there.
        adapter_macs: of that update's own products.
    """

    site: Site
    parameters: int
    macs: int
    adapter_parameters: int = 0
    adapter_macs: int = 0


@dataclass(frozen=True, repr=False)
class TowerCost(Result):
    """One tower.

    Attributes:
        tower: which.
        input_shape: (N, 3, H, W) or (N, L).
        parameters: of the base's weights that the tower reads, the projection included.
        macs, flops: of the base alone (`clipgraft.profile.ops`).
        attention_macs: of those, products of activations with each other.
        adapter_parameters, adapter_macs, adapter_flops: what the adapter that acts adds.
        sites: in the order of the data flow.
        trace: the tower as it is, adapter included.
    """

    _shows = ("tower", "input_shape", "parameters", "macs", "flops", "adapter_parameters", "adapter_macs")

    tower: Tower
    input_shape: tuple[int, ...]
    parameters: int
    macs: int
    flops: int
    attention_macs: int
    adapter_parameters: int
    adapter_macs: int
    adapter_flops: int
    sites: tuple[SiteCost, ...]
    trace: Trace


@dataclass(frozen=True, repr=False)
class ClipProfile(Result):
    """A CLIP model on a batch of images and one of texts.

    Attributes:
        name: what it was loaded by, or its class.
        batch: images, and texts.
        image_size: (height, width) in pixels; None of a text tower alone.
        text_tokens: length of the texts; None of a vision tower alone.
        parameters: of the model, its adapter and temperature included.
        text, vision: the towers; None where there is none, or a table of features.
        trace: both together.
    """

    _shows = ("name", "batch", "image_size", "text_tokens", "parameters", "macs", "flops")

    name: str
    batch: int
    image_size: tuple[int, int] | None
    text_tokens: int | None
    parameters: int
    text: TowerCost | None
    vision: TowerCost | None
    trace: Trace

    def table(self) -> Table:
        """The towers and their sum."""
        from clipgraft.profile.tables import towers_table

        return towers_table(self)

    @property
    def towers(self) -> tuple[TowerCost, ...]:
        """Those that there are: both, or the one of a tower alone."""
        return tuple(tower for tower in (self.text, self.vision) if tower is not None)

    @property
    def layers(self) -> tuple[LayerCost, ...]:
        """Every module, with what the towers made it do."""
        return self.trace.layers

    @property
    def macs(self) -> int:
        """Of all towers, adapter included."""
        return self.trace.total.macs

    @property
    def flops(self) -> int:
        """Of all towers, adapter included."""
        return self.trace.total.flops


def costs(
    model: ClipLike,
    *,
    batch: int = 1,
    text_tokens: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> ClipProfile:
    """Count what a forward pass of both towers costs. Nothing is computed and no weight is read.

    Args:
        model: a `Clip` or raw model, on any device; `clip_on_meta` makes one without weights. Of a tower
            alone, and of one beside a table of features, that tower is counted.
        batch: images, and texts.
        text_tokens: length of the texts; by default the context length.
        image_size: pixels, of a square or (height, width); by default what the model was made for.

    Raises:
        ModelError: the model takes no such texts or images.
    """
    clip = as_clip(model)
    inputs = inputs_of(clip, batch, text_tokens, image_size)
    towers = {tower: _tower_cost(clip, tower, given) for tower, given in inputs.items()}
    return ClipProfile(
        name=clip.source.name or type(clip.model).__name__,
        batch=batch,
        image_size=inputs.image_size,
        text_tokens=inputs.text_tokens,
        parameters=sum(p.numel() for p in clip.model.parameters()),
        text=towers.get("text"),
        vision=towers.get("vision"),
        trace=functools.reduce(join, (tower.trace for tower in towers.values())),
    )


@dataclass(frozen=True)
class ClipInputs:
    """Inputs of the towers: (N, L) token ids and (N, 3, H, W) pixels; None where there is no such tower."""

    tokens: Tensor | None
    images: Tensor | None

    def items(self) -> tuple[tuple[Tower, Tensor], ...]:
        """The towers that there are, each with what it is given."""
        given: tuple[tuple[Tower, Tensor | None], ...] = (("text", self.tokens), ("vision", self.images))
        return tuple((tower, inputs) for tower, inputs in given if inputs is not None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        if self.images is None:
            return None
        height, width = self.images.shape[2:]
        return height, width

    @property
    def text_tokens(self) -> int | None:
        return None if self.tokens is None else self.tokens.shape[1]


def inputs_of(
    clip: Clip, batch: int, text_tokens: int | None, image_size: int | tuple[int, int] | None
) -> ClipInputs:
    """Make inputs of the given sizes, or of the model's own, on the meta device.

    Raises:
        ModelError: texts too long for the model, or a size for a tower that it has not.
    """
    for tower, given, what in (("text", text_tokens, "text_tokens"), ("vision", image_size, "image_size")):
        if given is not None and tower not in clip.towers:
            raise ModelError(f"`{what}` is {given}, but {type(clip.model).__name__} has no {tower} tower")
    return ClipInputs(
        tokens=_tokens(clip, batch, text_tokens) if "text" in clip.towers else None,
        images=_images(clip, batch, image_size) if "vision" in clip.towers else None,
    )


def _tokens(clip: Clip, batch: int, text_tokens: int | None) -> Tensor:
    length = clip.context_length if text_tokens is None else text_tokens
    if not 1 <= length <= clip.context_length:
        raise ModelError(f"texts of {length} tokens: this model takes 1 to {clip.context_length}")
    return torch.empty(batch, length, dtype=torch.int64, device="meta")


def _images(clip: Clip, batch: int, image_size: int | tuple[int, int] | None) -> Tensor:
    size = clip.family.image_size(clip.model) if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(batch, 3, height, width, dtype=clip.dtype, device="meta")


def trace_tower(clip: Clip, tower: Tower, inputs: Tensor) -> Trace:
    """Trace one tower on (N, L) token ids or (N, 3, H, W) pixels; raises ModelError for other sizes."""
    run: Any = clip.family.encode_text if tower == "text" else clip.family.encode_image
    try:
        return trace(clip.model, inputs, call=run)
    except Exception as error:
        what = "x".join(map(str, inputs.shape))
        raise ModelError(
            f"the {tower} tower does not take an input of {what}: {one_line(error)}; keep to its own size, "
            "or set another one in the model's configuration"
        ) from error


def _tower_cost(clip: Clip, tower: Tower, inputs: Tensor) -> TowerCost:
    whole = trace_tower(clip, tower, inputs)
    base = whole
    if any(is_lora(name) for name in whole.weights):
        bare = Clip(on_meta(clip.model), clip.family)
        disable_lora(bare)
        base = trace_tower(bare, tower, inputs)
    sizes = {name: p.numel() for name, p in clip.model.named_parameters()}
    return TowerCost(
        tower=tower,
        input_shape=tuple(inputs.shape),
        parameters=sum(sizes[name] for name in base.weights),
        macs=base.total.macs,
        flops=base.total.flops,
        attention_macs=sum(product.macs for product in base.products if product.weight is None),
        adapter_parameters=sum(sizes[name] for name in whole.weights if is_lora(name)),
        adapter_macs=whole.total.macs - base.total.macs,
        adapter_flops=whole.total.flops - base.total.flops,
        sites=tuple(_site_costs(clip, tower, base, whole)),
        trace=whole,
    )


def _site_costs(clip: Clip, tower: Tower, base: Trace, whole: Trace) -> Iterable[SiteCost]:
    names = {id(p): name for name, p in clip.model.named_parameters()}
    by_weight: Counter[str | None] = Counter()
    for product in base.products:
        by_weight[product.weight] += product.macs
    updates = _updates(clip)
    for site, ref in clip.site_refs.items():
        if site.tower != tower:
            continue
        weight = base_parameter(clip.model.get_submodule(ref.module), ref.parameter)
        layer = updates.get(site)
        acts = layer is not None and any(names[id(p)] in whole.weights for p in layer.parameters())
        yield SiteCost(
            site=site,
            parameters=_size(ref),
            macs=by_weight[names[id(weight)]] * _size(ref) // weight.numel(),
            adapter_parameters=sum(p.numel() for p in layer.parameters()) if layer and acts else 0,
            adapter_macs=_update_macs(clip.model, layer, whole.products) if layer and acts else 0,
        )


def _updates(clip: Clip) -> dict[Site, LoraLayer]:
    state = lora_state(clip)
    return {} if state is None or state.in_effect is None else dict(state.in_effect.layers)


def _update_macs(model: nn.Module, layer: LoraLayer, products: Iterable[Product]) -> int:
    """Products that an update's own forward ran, or that read its factors from elsewhere."""
    path = next(name for name, module in model.named_modules() if module is layer)
    return sum(p.macs for p in products if p.module == path or (p.weight or "").startswith(f"{path}."))


def _size(ref: SiteRef) -> int:
    return torch.Size(ref.shape).numel()
