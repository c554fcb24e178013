"""The forward of plain towers in a handful of operators, the same for both families.

For exporters: the libraries' own forwards take fast paths, build masks in Python and fix the length of texts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.models.anatomy import Activation, Block, Linear, Part, TextTower, VisionTower


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
