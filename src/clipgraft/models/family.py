"""What clipgraft needs to know of a model family, and nothing more.

Each family is one file (`openclip`, `hf`) that knows its module paths. Everything else asks through this
protocol, so a new family is a new file and one line in `clip.family_of`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from clipgraft.models.architecture import TextTower, VisionTower
from clipgraft.models.names import Twin
from clipgraft.models.sites import Site, SiteRef, Tower

_IN_PROJ = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
LARGEST_ID = -1
"""A text tower that is pooled at its largest id, as CLIP's own is, rather than at one certain id."""


class Family(Protocol):
    """A model family: pure functions of the model, without state of its own."""

    name: str

    def accepts(self, model: nn.Module) -> bool:
        """Whether this family knows the model."""

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        """Every site of the model, in the order of the data flow."""

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, D) features, not normalised."""

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """(N, L) token ids, L up to the context length -> (N, D) features, not normalised."""

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        """(N,) position of the pooled token, or None if the tower can see what follows that token.

        Where it is not None, tokens after the largest position change nothing and may be cut.
        """

    def pooled_id(self, model: nn.Module) -> int | None:
        """The id whose first position is pooled, `LARGEST_ID` for the largest one; None for other ways."""

    def text_tower(self, model: nn.Module) -> TextTower | None:
        """The parts of a plain causal text tower; None where its forward differs in anything."""

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        """The parts of a plain vision transformer; None where its forward differs in anything."""

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """(height, width) in pixels that the vision tower takes."""

    def context_length(self, model: nn.Module) -> int:
        """Longest token sequence the text tower takes."""

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        """The tower's parameters from input to output in the groups open_clip's lock_*_tower unlocks."""

    def set_grad_checkpointing(self, model: nn.Module, enable: bool) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""

    def twin(self, model: nn.Module) -> Twin:
        """The transformers class whose module names adapter files of this model are written in."""

    def norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        """The layer norms of both towers by their path in the model's twin."""

    def canonical_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Base weights under the twin's names, (out, in) oriented, adapters left out.

        What the twin has no module for keeps its own name.
        """


def site_weight(model: nn.Module, ref: SiteRef) -> Tensor:
    """The base weight of a site in its canonical shape, as a view where the layout allows it."""
    weight = base_parameter(model.get_submodule(ref.module), ref.parameter)
    if ref.rows is not None:
        return weight[ref.rows]
    if ref.kind == "table":
        return weight.view(ref.shape)
    return weight.T if ref.kind == "projection" else weight


def site_bias(model: nn.Module, ref: SiteRef) -> Tensor | None:
    """The base's bias at a site, (out,), as a view; None where it has none."""
    if ref.kind in ("embedding", "table", "projection"):
        return None
    if ref.bias:
        owner, _, name = ref.bias.rpartition(".")
        return base_parameter(model.get_submodule(owner), name)
    *path, leaf = ref.parameter.split(".")
    name = "in_proj_bias" if leaf in _IN_PROJ else "bias"
    host = model.get_submodule(".".join(filter(None, [ref.module, *path])))
    if getattr(host, name, None) is None:
        return None
    bias = base_parameter(host, name)
    if leaf in _IN_PROJ[1:]:
        return bias.chunk(3)[_IN_PROJ.index(leaf) - 1]
    return bias if ref.rows is None else bias[ref.rows]


def base_parameter(owner: nn.Module, name: str) -> Tensor:
    """Parameter `name` of `owner` without any adapter on top (wrapped and parametrised ones included)."""
    *path, leaf = name.split(".")
    owner = owner.get_submodule(".".join(path))
    if leaf in getattr(owner, "parametrizations", {}):
        original: Tensor = owner.parametrizations[leaf].original  # type: ignore[union-attr, index]
        return original
    value = getattr(owner, leaf)
    weight = value.weight if isinstance(value, nn.Module) else value
    if not isinstance(weight, Tensor):
        raise TypeError(f"{leaf} of {type(owner).__name__} is not a tensor")
    return weight


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's weights and buffers by their own names, adapters left out."""
    for name, tensor in model.state_dict().items():
        if not is_lora(name):
            yield name.replace("parametrizations.", "").removesuffix(".original"), tensor


def is_pure_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is a layer norm and nothing more; timm has some that end in an activation."""
    return isinstance(module, nn.LayerNorm) and isinstance(getattr(module, "act", None), nn.Identity | None)


def pure_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """`Family.norms` of a model that goes by its own module names."""
    return {name: module for name, module in model.named_modules() if is_pure_norm(module)}


def no_plain_tower(model: nn.Module) -> None:
    """Answer `text_tower`, `vision_tower` and `pooled_id` of a family without plain towers: None."""


def is_lora(name: str) -> bool:
    """Whether a parameter name belongs to an adapter rather than to the base."""
    return any(part == "lora" or part.startswith("lora_") for part in name.split("."))


def pooled_positions(tokens: Tensor, pooled_id: int) -> Tensor:
    """(N, L) ids and what `Family.pooled_id` says -> (N,) positions that are pooled."""
    if pooled_id == LARGEST_ID:
        return tokens.argmax(dim=-1)
    return tokens.eq(pooled_id).to(torch.int32).argmax(dim=-1)  # 0 where there is none


def parameters_of(items: Sequence[object]) -> list[nn.Parameter]:
    """Parameters of modules and bare Parameters, in order; None is skipped."""
    found: list[nn.Parameter] = []
    for item in items:
        if isinstance(item, nn.Parameter):
            found.append(item)
        elif isinstance(item, nn.Module):
            found.extend(item.parameters())
    return found
