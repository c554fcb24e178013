"""Plain transformer towers: their weights by what they do, the same for every family.

The engine computes from these parts what the model's own forward would, in fewer steps. A family describes a
tower only where its forward is the plain pre-norm transformer below, to the last detail; for any other tower
it gives None, and the model's own forward runs.

    h = x + out(attention(qkv(norm1(x))));  x' = h + fc2(act(fc1(norm2(h))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from clipgraft.models.sites import Site


@dataclass(frozen=True)
class Part:
    """One site's share of a linear map.

    Attributes:
        weight: (out, in), or larger if it is fused with others; (out, in, h, w) for a patch convolution;
            (rows, dim) for a table.
        bias: (out,) or None, fused like the weight.
        rows: the rows of a fused weight and bias that are this part; None for all.
        site: what an adapter calls it.
        transposed: whether the weight is (in, out) instead.
    """

    weight: Tensor
    bias: Tensor | None
    rows: slice | None
    site: Site
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """This part's share of the weight in the shape its site has (`SiteRef.shape`), as a view."""
        if self.rows is not None:
            return self.weight[self.rows]
        return self.weight.T if self.transposed else self.weight

    @property
    def offset(self) -> Tensor | None:
        """This part's share of the bias."""
        return self.bias if self.bias is None or self.rows is None else self.bias[self.rows]


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
        tokens: the (vocabulary, dim) table.
        positions: the (context, dim) table.
        blocks: from input to output.
        heads: of every block.
        norm: of the residual at the pooled token.
        proj: from there to the features; None if the norm gives them.
    """

    tokens: Part
    positions: Part
    blocks: tuple[Block, ...]
    heads: int
    norm: nn.LayerNorm
    proj: Linear | None


@dataclass(frozen=True)
class VisionTower:
    """A vision transformer that is pooled at its class token, the first.

    Attributes:
        patch: the patch convolution; its stride is `patch_size`, without padding.
        patch_size: (height, width) in pixels.
        class_embedding: (dim,).
        positions: the (1 + patches, dim) table.
        norm_pre: norm before the first block.
        blocks, heads, norm, proj: as in `TextTower`.
    """

    patch: Linear
    patch_size: tuple[int, int]
    class_embedding: Tensor
    positions: Part
    norm_pre: nn.LayerNorm
    blocks: tuple[Block, ...]
    heads: int
    norm: nn.LayerNorm
    proj: Linear | None


def activation_of(module: object) -> Activation | None:
    """Which activation a module computes; None for any but CLIP's own."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    # open_clip, transformers and timm each have classes of their own.
    names: dict[str, Activation] = {
        "QuickGELU": "quick_gelu",
        "QuickGELUActivation": "quick_gelu",
        "GELUActivation": "gelu",
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
    }
    return names.get(type(module).__name__)


def linear_part(module: nn.Module, site: Site) -> Part | None:
    """A plain `nn.Linear` as a part; None for anything that computes otherwise."""
    return Part(module.weight, module.bias, None, site) if type(module) is nn.Linear else None
