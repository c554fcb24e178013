"""Both towers from their parts: one run through the blocks serves captions and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgraft.engine.activation import activate
from clipgraft.engine.attention import (
    Attend,
    causal_mask,
    join_heads,
    length_mask,
    look_up,
    split_heads,
)
from clipgraft.engine.linear import Update, frozen_linear, trained_linear
from clipgraft.engine.packing import Group, Packed
from clipgraft.engine.weights import Weights, out_rows
from clipgraft.lora.layers import LoraLayer
from clipgraft.models.anatomy import Block, Linear, TextTower, VisionTower
from clipgraft.models.sites import Site


class Layout(Protocol):
    """Which nodes attend to which."""

    @property
    def pooled(self) -> Tensor:
        """(B,) the node of every row that the tower is pooled at."""

    def attend(self, qkv: Tensor, heads: int, kernel: Attend) -> Tensor:
        """(N, 3 · dim) -> (N, dim): every node looks at its row."""

    def attend_pooled(self, q: Tensor, kv: Tensor, heads: int, kernel: Attend) -> Tensor:
        """(B, dim), (N, 2 · dim) -> (B, dim): only the pooled nodes look."""


@dataclass(frozen=True)
class Images:
    """Rows of equal length that see all of themselves, pooled at their first node."""

    rows: int
    length: int
    device: torch.device

    @property
    def pooled(self) -> Tensor:
        return torch.arange(self.rows, device=self.device) * self.length

    def attend(self, qkv: Tensor, heads: int, kernel: Attend) -> Tensor:
        queries, keys, values = split_heads(qkv, self.rows, 3, heads)
        return join_heads(kernel(queries, keys, values, None))

    def attend_pooled(self, q: Tensor, kv: Tensor, heads: int, kernel: Attend) -> Tensor:
        (queries,), (keys, values) = split_heads(q, self.rows, 1, heads), split_heads(kv, self.rows, 2, heads)
        return join_heads(kernel(queries, keys, values, None))


@dataclass(frozen=True)
class Captions:
    """Packed captions, causal."""

    packed: Packed

    @property
    def pooled(self) -> Tensor:
        return self.packed.pooled

    def attend(self, qkv: Tensor, heads: int, kernel: Attend) -> Tensor:
        contexts = []
        for group, cells in self._cells(qkv):
            queries, keys, values = split_heads(cells, group.rows, 3, heads)
            contexts.append(join_heads(kernel(queries, keys, values, causal_mask(group.width, qkv.device))))
        return torch.cat(contexts).index_select(0, self.packed.places)

    def attend_pooled(self, q: Tensor, kv: Tensor, heads: int, kernel: Attend) -> Tensor:
        contexts = []
        pooled = torch.split(q, [group.rows for group in self.packed.groups])
        for query, (group, cells) in zip(pooled, self._cells(kv), strict=True):
            (queries,) = split_heads(query, group.rows, 1, heads)
            keys, values = split_heads(cells, group.rows, 2, heads)
            mask = length_mask(group.lengths, group.width)
            contexts.append(join_heads(kernel(queries, keys, values, mask)))
        return torch.cat(contexts)

    def _cells(self, nodes: Tensor) -> list[tuple[Group, Tensor]]:
        packed = self.packed
        cells = look_up(nodes, packed)
        sizes = [group.rows * group.width for group in packed.groups]
        return list(zip(packed.groups, torch.split(cells, sizes), strict=True))


_RunBlock: TypeAlias = Callable[[Tensor, Block, int, Layout], Tensor]


@dataclass(frozen=True)
class Run:
    """How to compute.

    Attributes:
        weights: base weights in the compute type.
        updates: enabled low-rank updates by site.
        kernel: of attention.
        checkpointing: keep only the input of each block, and compute the block again for its gradient.
    """

    weights: Weights
    updates: Mapping[Site, LoraLayer]
    kernel: Attend
    checkpointing: bool = False

    @property
    def residual(self) -> torch.dtype:
        """Type of the residual stream: at least fp32."""
        return torch.promote_types(self.weights.dtype, torch.float32)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """(N, in) of the compute type -> (N, out) of it."""
        updates, start = [], 0
        for part in linear:
            stop = start + out_rows(part)
            if part.site in self.updates:
                updates.append(Update(self.updates[part.site], slice(start, stop)))
            start = stop
        frozen = self.weights.frozen(linear)
        if frozen is not None:
            return frozen_linear(x, frozen, updates)
        return trained_linear(x, *self.weights.stacked(linear), updates)

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Layer norm of the fp32 residual, in the compute type."""
        normed = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), _to(norm.bias, x), norm.eps)
        return normed.to(self.weights.dtype)

    def blocks(self, x: Tensor, blocks: tuple[Block, ...], heads: int, layout: Layout) -> Tensor:
        """The (N, dim) residual through all blocks -> (B, dim) at the pooled nodes."""
        x = self.some_blocks(x, blocks[:-1], heads, layout)
        return self._maybe_again(self._last_block, x, blocks[-1], heads, layout)

    def some_blocks(self, x: Tensor, blocks: tuple[Block, ...], heads: int, layout: Layout) -> Tensor:
        """The (N, dim) residual through blocks that are not the last -> (N, dim)."""
        for block in blocks:
            x = self._maybe_again(self._block, x, block, heads, layout)
        return x

    def _maybe_again(self, run: _RunBlock, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, block, heads, layout, use_reentrant=False)
        return run(x, block, heads, layout)

    def _block(self, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        qkv = self.linear(self.norm(x, block.norm1), block.qkv)
        x = x + self.linear(layout.attend(qkv, heads, self.kernel), block.out)
        return self._mlp(x, block)

    def _last_block(self, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        """Nothing reads the other nodes any more: they give keys and values, and no more."""
        normed = self.norm(x, block.norm1)
        kv = self.linear(normed, block.qkv[1:])
        q = self.linear(normed.index_select(0, layout.pooled), block.qkv[:1])
        context = layout.attend_pooled(q, kv, heads, self.kernel)
        x = x.index_select(0, layout.pooled) + self.linear(context, block.out)
        return self._mlp(x, block)

    def _mlp(self, x: Tensor, block: Block) -> Tensor:
        hidden = activate(self.linear(self.norm(x, block.norm2), block.fc1), block.act)
        return x + self.linear(hidden, block.fc2)


def _to(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def run_text(tower: TextTower, packed: Packed, run: Run) -> Tensor:
    """Packed captions -> (B, D) fp32 features, in the order they were packed in."""
    x = tower.embed(packed.tokens, packed.positions).to(run.residual)
    pooled = run.blocks(x, tower.blocks, tower.heads, Captions(packed))
    return _finish(tower, pooled).index_select(0, packed.row_of)


def run_vision(tower: VisionTower, pixels: Tensor, run: Run) -> Tensor:
    """(B, 3, H, W) pixels -> (B, D) fp32 features."""
    x = embed_patches(tower, pixels, run)
    return run_from_patches(tower, x, run)


def embed_patches(tower: VisionTower, pixels: Tensor, run: Run) -> Tensor:
    """(B, 3, H, W) pixels -> (B, 1 + patches, dim) input of the first block, fp32."""
    height, width = tower.patch_size
    rows, down, across = len(pixels), pixels.shape[2] // height, pixels.shape[3] // width
    tiles = pixels[:, :, : down * height, : across * width].to(run.weights.dtype)
    tiles = tiles.view(rows, -1, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
    patches = run.linear(tiles.reshape(rows * down * across, -1), tower.patch).to(run.residual)
    first = tower.class_embedding().to(run.residual).expand(rows, 1, -1)
    x = torch.cat([first, patches.view(rows, down * across, -1)], dim=1) + tower.positions()
    norm = tower.norm_pre
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), _to(norm.bias, x), norm.eps)


def run_from_patches(tower: VisionTower, x: Tensor, run: Run, first: int = 0) -> Tensor:
    """(B, L, dim) input of block number `first` -> (B, D) fp32 features."""
    layout = _images(x)
    pooled = run.blocks(x.flatten(0, 1), tower.blocks[first:], tower.heads, layout)
    return _finish(tower, pooled)


def run_to_block(tower: VisionTower, x: Tensor, run: Run, stop: int) -> Tensor:
    """(B, L, dim) input of the first block -> (B, L, dim) input of block number `stop`."""
    return run.some_blocks(x.flatten(0, 1), tower.blocks[:stop], tower.heads, _images(x)).view(x.shape)


def _images(x: Tensor) -> Images:
    return Images(x.shape[0], x.shape[1], x.device)


def _finish(tower: TextTower | VisionTower, pooled: Tensor) -> Tensor:
    """The final norm and projection in the weights' own type: they see one node a row."""
    return tower.finish(pooled.to(tower.blocks[-1].norm2.weight.dtype)).to(pooled.dtype)
