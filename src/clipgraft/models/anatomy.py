"""A tower taken apart: its weights by what they do, the same for every family.

The engine computes from these parts what the model's own forward would, in fewer steps. A family describes a
tower only where its forward is the plain pre-norm transformer below, to the last detail; for any other tower
it gives None, and the model's own forward runs.

    h = x + out(attention(qkv(norm1(x))));  x' = h + fc2(act(fc1(norm2(h))))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from clipgraft.models.sites import Site


@dataclass(frozen=True)
class Part:
    """One site's share of a linear map.

    Attributes:
        weight: (out, in), or larger if it is fused with others; (out, in, h, w) for a patch convolution.
        bias: (out,) or None, fused like the weight.
        rows: the rows of a fused weight and bias that are this part; None for all.
        site: what an adapter calls it.
    """

    weight: Tensor
    bias: Tensor | None
    rows: slice | None
    site: Site


Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Linear: TypeAlias = tuple[Part, ...]
"""A linear map whose output is that of its parts, side by side; parts with `rows` are neighbours in order."""


@dataclass(frozen=True)
class Block:
    """One residual block."""

    norm1: nn.LayerNorm
    qkv: Linear
    out: Linear
    norm2: nn.LayerNorm
    fc1: Linear
    act: Activation
    fc2: Linear


@dataclass(frozen=True)
class TextTower:
    """A causal text tower that is pooled at one token.

    Attributes:
        embed: (N,) token ids and their (N,) positions -> (N, dim).
        blocks: from input to output.
        heads: of every block.
        finish: (B, dim) residual at the pooled token -> (B, D) features.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    blocks: tuple[Block, ...]
    heads: int
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class VisionTower:
    """A vision transformer that is pooled at its class token, the first.

    Attributes:
        patch: the patch convolution; its stride is `patch_size`, without padding.
        patch_size: (height, width) in pixels.
        class_embedding: () -> (dim,).
        positions: () -> (1 + patches, dim).
        norm_pre: norm before the first block.
        blocks, heads, finish: as in `TextTower`.
    """

    patch: Linear
    patch_size: tuple[int, int]
    class_embedding: Callable[[], Tensor]
    positions: Callable[[], Tensor]
    norm_pre: nn.LayerNorm
    blocks: tuple[Block, ...]
    heads: int
    finish: Callable[[Tensor], Tensor]


def activation_of(module: object) -> Activation | None:
    """Which activation a module computes; None for any but CLIP's own."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    # open_clip and transformers each have a class of their own.
    names: dict[str, Activation] = {
        "QuickGELU": "quick_gelu",
        "QuickGELUActivation": "quick_gelu",
        "GELUActivation": "gelu",
    }
    return names.get(type(module).__name__)


def linear_part(module: nn.Module, site: Site) -> Part | None:
    """A plain `nn.Linear` as a part; None for anything that computes otherwise."""
    return Part(module.weight, module.bias, None, site) if type(module) is nn.Linear else None
