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
            (rows, dim) for a table, with leading dimensions of 1 or without.
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
        if self.weight.ndim == 3:
            return self.weight.flatten(0, 1)
        return self.weight.T if self.transposed else self.weight

    @property
    def outputs(self) -> int:
        """The number of rows of `matrix`."""
        if self.rows is not None:
            return len(range(*self.rows.indices(self.weight.shape[0])))
        if self.weight.ndim == 3:
            return self.weight.shape[0] * self.weight.shape[1]
        return self.weight.shape[1 if self.transposed else 0]

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
class AttentionPool:
    """One query that looks at all of a tower's last norm, and an MLP after it (Lee et al. 2019, PMA).

    context = out(attention(q(probe), k(x), v(x)));  features = context + fc2(act(fc1(norm(context))))

    Attributes:
        probe: the query before `q`, with leading dimensions of 1.
        q, kv, out, norm, fc1, act, fc2: as in `Block`.
        heads: of the attention.
    """

    probe: Tensor
    q: Linear
    kv: Linear
    out: Linear
    norm: nn.LayerNorm
    fc1: Linear
    act: Activation
    fc2: Linear
    heads: int


@dataclass(frozen=True)
class TextTower:
    """A text tower that is pooled at one token.

    Attributes:
        tokens: the (vocabulary, dim) table.
        positions: the (context, dim) table.
        blocks: from input to output.
        heads: of every block.
        norm: of the residual at the pooled token.
        proj: from there to the features; None if the norm gives them.
        causal: whether a token sees those before it alone. Otherwise all see all, padding included, and the
            last one is pooled, whatever it is.
    """

    tokens: Part
    positions: Part
    blocks: tuple[Block, ...]
    heads: int
    norm: nn.LayerNorm
    proj: Linear | None
    causal: bool = True


@dataclass(frozen=True)
class VisionTower:
    """A vision transformer that is pooled at its class token, the first, or by attention.

    Attributes:
        patch: the patch convolution; its stride is `patch_size`, without padding.
        patch_size: (height, width) in pixels.
        class_embedding: (dim,); None for a tower without a class token.
        positions: the (tokens, dim) table: of the patches, after the class token.
        norm_pre: norm before the first block; None for none.
        blocks, heads, norm, proj: as in `TextTower`.
        pool: what makes features of the norm of all tokens; None where the class token's are used.
    """

    patch: Linear
    patch_size: tuple[int, int]
    class_embedding: Tensor | None
    positions: Part
    norm_pre: nn.LayerNorm | None
    blocks: tuple[Block, ...]
    heads: int
    norm: nn.LayerNorm
    proj: Linear | None
    pool: AttentionPool | None = None


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
