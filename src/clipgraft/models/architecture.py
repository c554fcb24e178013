"""Plain transformer towers: their weights by what they do, the same for every family, and their forward.

The engine computes from these parts what the model's own forward would, in fewer steps. A family describes a
tower only where its forward is the plain pre-norm transformer below, to the last detail; for any other tower
it gives None, and the model's own forward runs.

    h = x + out(attention(qkv(norm1(x))));  x' = h + fc2(act(fc1(norm2(h))))

`text_features` and `image_features` are that forward in a handful of operators, for exporters: the libraries'
own forwards take fast paths, build masks in Python and fix the length of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
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
    # open_clip and transformers each have a class of their own.
    names: dict[str, Activation] = {
        "QuickGELU": "quick_gelu",
        "QuickGELUActivation": "quick_gelu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
    }
    return names.get(type(module).__name__)


def linear_part(module: nn.Module, site: Site) -> Part | None:
    """A plain `nn.Linear` as a part; None for anything that computes otherwise."""
    return Part(module.weight, module.bias, None, site) if type(module) is nn.Linear else None


def text_features(tower: TextTower, tokens: Tensor, ends: Tensor) -> Tensor:
    """(N, L) int64 ids and the (N,) positions of their pooled tokens -> (N, D) features."""
    rows, length = tokens.shape
    x = F.embedding(tokens, tower.tokens.weight) + tower.positions.weight[:length]
    for block in tower.blocks:
        x = _block(block, x, tower.heads, causal=True)
    return _finish(tower, x[torch.arange(rows, device=tokens.device), ends])


def image_features(tower: VisionTower, images: Tensor) -> Tensor:
    """(N, 3, H, W) pixels -> (N, D) features."""
    (patch,) = tower.patch
    patches = F.conv2d(images, patch.weight, patch.bias, stride=tower.patch_size).flatten(2).transpose(1, 2)
    first = tower.class_embedding.expand(patches.shape[0], 1, -1)
    x: Tensor = tower.norm_pre(torch.cat([first, patches], dim=1) + tower.positions.weight)
    for block in tower.blocks:
        x = _block(block, x, tower.heads, causal=False)
    return _finish(tower, x[:, 0])


def _finish(tower: TextTower | VisionTower, pooled: Tensor) -> Tensor:
    normed: Tensor = tower.norm(pooled)
    return normed if tower.proj is None else _linear(tower.proj, normed)


def _block(block: Block, x: Tensor, heads: int, causal: bool) -> Tensor:
    q, k, v = (torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in _qkv(block.qkv, block.norm1(x)))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + _linear(block.out, context.transpose(1, 2).flatten(2))
    inner = _activate(block.act, _linear(block.fc1, block.norm2(x)))
    return x + _linear(block.fc2, inner)


def _qkv(parts: Linear, x: Tensor) -> tuple[Tensor, ...]:
    """One product where the three share a weight."""
    if parts[0].rows is not None:
        return F.linear(x, parts[0].weight, parts[0].bias).chunk(3, dim=-1)
    return tuple(_part(part, x) for part in parts)


def _linear(parts: Linear, x: Tensor) -> Tensor:
    (part,) = parts
    return _part(part, x)


def _part(part: Part, x: Tensor) -> Tensor:
    return F.linear(x, part.matrix, part.bias)


def _activate(act: Activation, x: Tensor) -> Tensor:
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
