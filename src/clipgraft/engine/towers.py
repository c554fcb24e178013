"""Compute both towers from their parts: the same blocks serve captions and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgraft.engine.attention import (
    Attend,
    causal_mask,
    join_heads,
    length_mask,
    look_up,
    split_heads,
)
from clipgraft.engine.linear import WeightCache, frozen_linear, trained_linear
from clipgraft.engine.mixed_adapters import ActiveAdapter, MixedAdapters
from clipgraft.engine.packing import Group, Packed
from clipgraft.models.architecture import (
    Activation,
    AttentionPool,
    Block,
    Linear,
    Part,
    TextTower,
    VisionTower,
)

_SLOPE = 1.702


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
class WholeRows:
    """Rows of equal length that see all of themselves: images, and captions without a causal mask.

    Attributes:
        pooled_at: the node of a row that is pooled.
    """

    rows: int
    length: int
    device: torch.device
    pooled_at: int = 0

    @property
    def pooled(self) -> Tensor:
        return torch.arange(self.rows, device=self.device) * self.length + self.pooled_at

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
    _masks: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pooled(self) -> Tensor:
        return self.packed.pooled

    def attend(self, qkv: Tensor, heads: int, kernel: Attend) -> Tensor:
        contexts = []
        for group, cells in self._cells(qkv):
            queries, keys, values = split_heads(cells, group.rows, 3, heads)
            contexts.append(join_heads(kernel(queries, keys, values, self._mask(group.width))))
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

    def _mask(self, width: int) -> Tensor:
        """`causal_mask`, made once for all blocks."""
        if width not in self._masks:
            self._masks[width] = causal_mask(width, self.packed.tokens.device)
        return self._masks[width]

    def _cells(self, nodes: Tensor) -> list[tuple[Group, Tensor]]:
        packed = self.packed
        cells = look_up(nodes, packed)
        sizes = [group.rows * group.width for group in packed.groups]
        return list(zip(packed.groups, torch.split(cells, sizes), strict=True))


_BlockForward: TypeAlias = Callable[[Tensor, Block, int, Layout], Tensor]


@dataclass(frozen=True)
class TowerPass:
    """One forward pass: its weights, adapters and kernel.

    Attributes:
        weights: base weights in the compute type.
        adapter: the adapter of all rows; without effect where there is a `mix`.
        kernel: of attention.
        checkpointing: keep only the input of each block, and compute the block again for its gradient.
        mix: adapters that act on some rows each, without gradients; None for one adapter, or none, on all.
    """

    weights: WeightCache
    adapter: ActiveAdapter
    kernel: Attend
    checkpointing: bool = False
    mix: MixedAdapters | None = None

    def times(self, length: int) -> TowerPass:
        """Return the pass for rows of `length` nodes each."""
        return self if self.mix is None else replace(self, mix=self.mix.times(length))

    @property
    def residual(self) -> torch.dtype:
        """Type of the residual stream: at least fp32."""
        return torch.promote_types(self.weights.dtype, torch.float32)

    def linear(self, x: Tensor, linear: Linear, pooled: bool = False) -> Tensor:
        """(N, in) of the compute type -> (N, out) of it; `pooled` says that rows are pooled nodes."""
        frozen = self.weights.frozen(linear)
        if self.mix is not None:
            assert frozen is not None
            return self.mix.linear(frozen.forward(x), x, linear, pooled)
        updates = self.adapter.updates(linear)
        if frozen is not None:
            return frozen_linear(x, frozen, updates)
        return trained_linear(x, *self.weights.stacked(linear), updates)

    def norm(self, x: Tensor, norm: nn.LayerNorm, pooled: bool = False) -> Tensor:
        """Layer norm of the fp32 residual, in the compute type."""
        return self.wide_norm(x, norm, pooled).to(self.weights.dtype)

    def wide_norm(self, x: Tensor, norm: nn.LayerNorm, pooled: bool = False) -> Tensor:
        """The same in the type of x."""
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        if self.mix is None and bias is not None and norm in self.adapter.norms:
            bias = bias + self.adapter.norms[norm].to(x.dtype)
        normed = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), bias, norm.eps)
        return normed if self.mix is None else self.mix.norm(normed, norm, pooled)

    def embed(self, tokens: Tensor, part: Part) -> Tensor:
        """(N,) ids -> (N, dim) out of a table, in its own type."""
        x = F.embedding(tokens, part.weight)
        if self.mix is not None:
            return self.mix.embed(x, tokens, part)
        layer = self.adapter.layers.get(part.site)
        return x if layer is None else layer.adapt(x, tokens, part.weight, None)

    def positions(self, indices: Tensor, part: Part) -> Tensor:
        """(N,) positions -> (N, dim) out of a small table, in its own type."""
        if self.mix is not None:
            return self.mix.positions(part.matrix.index_select(0, indices), indices, part)
        layer = self.adapter.layers.get(part.site)
        return (part.matrix if layer is None else layer.folded(part.matrix)).index_select(0, indices)

    def finish(self, pooled: Tensor, norm: nn.LayerNorm, proj: Linear | None) -> Tensor:
        """(B, dim) residual at the pooled nodes -> (B, D) features of its type.

        In the weights' own type: they see one node a row.
        """
        own = norm.weight.dtype
        normed = self.wide_norm(pooled.to(own), norm, pooled=True)
        if proj is None:
            return normed.to(pooled.dtype)
        (part,) = proj
        if self.mix is not None:
            features = self.mix.linear(F.linear(normed, part.matrix, part.bias), normed, proj, pooled=True)
        else:
            features = trained_linear(normed, part.matrix, part.bias, self.adapter.updates(proj))
        return features.to(pooled.dtype)

    def pool(self, x: Tensor, norm: nn.LayerNorm, pool: AttentionPool, rows: WholeRows) -> Tensor:
        """The (N, dim) residual after the last block -> (B, dim) features."""
        probe = pool.probe.reshape(1, -1).to(self.weights.dtype).expand(rows.rows, -1)
        query = self.linear(probe, pool.q, pooled=True)
        kv = self.linear(self.norm(x, norm), pool.kv)
        context = rows.attend_pooled(query, kv, pool.heads, self.kernel)
        pooled = self.linear(context, pool.out, pooled=True).to(self.residual)
        hidden = self.linear(self.norm(pooled, pool.norm, pooled=True), pool.fc1, pooled=True)
        return pooled + self.linear(activate(hidden, pool.act), pool.fc2, pooled=True)

    def blocks(self, x: Tensor, blocks: tuple[Block, ...], heads: int, layout: Layout) -> Tensor:
        """The (N, dim) residual through all blocks -> (B, dim) at the pooled nodes."""
        x = self.some_blocks(x, blocks[:-1], heads, layout)
        return self._maybe_again(self._last_block, x, blocks[-1], heads, layout)

    def some_blocks(self, x: Tensor, blocks: tuple[Block, ...], heads: int, layout: Layout) -> Tensor:
        """The (N, dim) residual through blocks that are not the last -> (N, dim)."""
        for block in blocks:
            x = self._maybe_again(self._block, x, block, heads, layout)
        return x

    def _maybe_again(self, run: _BlockForward, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, block, heads, layout, use_reentrant=False)
        return run(x, block, heads, layout)

    def _block(self, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        qkv = self.linear(self.norm(x, block.norm1), block.qkv)
        x = x + self.linear(layout.attend(qkv, heads, self.kernel), block.out)
        return self._mlp(x, block)

    def _last_block(self, x: Tensor, block: Block, heads: int, layout: Layout) -> Tensor:
        """Compute the last block at the pooled nodes alone; the others give keys and values only."""
        normed = self.norm(x, block.norm1)
        kv = self.linear(normed, block.qkv[1:])
        q = self.linear(normed.index_select(0, layout.pooled), block.qkv[:1], pooled=True)
        context = layout.attend_pooled(q, kv, heads, self.kernel)
        x = x.index_select(0, layout.pooled) + self.linear(context, block.out, pooled=True)
        return self._mlp(x, block, pooled=True)

    def _mlp(self, x: Tensor, block: Block, pooled: bool = False) -> Tensor:
        hidden = activate(self.linear(self.norm(x, block.norm2, pooled), block.fc1, pooled), block.act)
        return x + self.linear(hidden, block.fc2, pooled)


def linears(tower: TextTower | VisionTower) -> Iterator[Linear]:
    """Every linear map of a tower as a pass asks for it."""
    pool = tower.pool if isinstance(tower, VisionTower) else None
    if isinstance(tower, VisionTower):
        yield tower.patch
    for block in tower.blocks:
        whole = block is not tower.blocks[-1] or pool is not None
        yield from (block.qkv,) if whole else (block.qkv[1:], block.qkv[:1])
        yield from (block.out, block.fc1, block.fc2)
    if pool is not None:
        yield from (pool.q, pool.kv, pool.out, pool.fc1, pool.fc2)
    if tower.proj is not None:
        yield tower.proj


def run_text(tower: TextTower, packed: Packed, run: TowerPass) -> Tensor:
    """Packed captions -> (B, D) fp32 features, in the order they were packed in."""
    x = run.embed(packed.tokens, tower.tokens) + run.positions(packed.positions, tower.positions)
    pooled = run.blocks(x.to(run.residual), tower.blocks, tower.heads, Captions(packed))
    return run.finish(pooled, tower.norm, tower.proj).index_select(0, packed.row_of)


def run_whole_text(tower: TextTower, tokens: Tensor, run: TowerPass) -> Tensor:
    """(B, L) token ids that all see each other -> (B, D) fp32 features."""
    rows, length = tokens.shape
    run = run.times(length)
    positions = torch.arange(length, device=tokens.device).repeat(rows)
    x = run.embed(tokens.flatten(), tower.tokens) + run.positions(positions, tower.positions)
    layout = WholeRows(rows, length, tokens.device, pooled_at=length - 1)
    pooled = run.blocks(x.to(run.residual), tower.blocks, tower.heads, layout)
    return run.finish(pooled, tower.norm, tower.proj)


def run_vision(tower: VisionTower, pixels: Tensor, run: TowerPass) -> Tensor:
    """(B, 3, H, W) pixels -> (B, D) fp32 features."""
    x = embed_patches(tower, pixels, run)
    return run_from_patches(tower, x, run)


def embed_patches(tower: VisionTower, pixels: Tensor, run: TowerPass) -> Tensor:
    """(B, 3, H, W) pixels -> (B, tokens, dim) input of the first block, fp32."""
    height, width = tower.patch_size
    rows, down, across = len(pixels), pixels.shape[2] // height, pixels.shape[3] // width
    tiles = pixels[:, :, : down * height, : across * width].to(run.weights.dtype)
    tiles = tiles.view(rows, -1, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(rows * down * across, -1)
    x = run.times(down * across).linear(tiles, tower.patch).to(run.residual).view(rows, down * across, -1)
    if tower.class_embedding is not None:
        x = torch.cat([tower.class_embedding.to(run.residual).expand(rows, 1, -1), x], dim=1)
    x = x + _vision_positions(tower, rows, run)
    if tower.norm_pre is None:
        return x
    return run.times(x.shape[1]).wide_norm(x.flatten(0, 1), tower.norm_pre).view(x.shape)


def _vision_positions(tower: VisionTower, rows: int, run: TowerPass) -> Tensor:
    """(tokens, dim), or (rows, tokens, dim) where rows differ."""
    length = tower.positions.matrix.shape[0]
    indices = torch.arange(length, device=tower.positions.weight.device)
    if run.mix is None:
        return run.positions(indices, tower.positions)
    return run.times(length).positions(indices.repeat(rows), tower.positions).view(rows, length, -1)


def run_from_patches(tower: VisionTower, x: Tensor, run: TowerPass, first: int = 0) -> Tensor:
    """(B, L, dim) input of block number `first` -> (B, D) fp32 features."""
    run, rows = run.times(x.shape[1]), _images(x)
    if tower.pool is None:
        pooled = run.blocks(x.flatten(0, 1), tower.blocks[first:], tower.heads, rows)
        return run.finish(pooled, tower.norm, tower.proj)
    x = run.some_blocks(x.flatten(0, 1), tower.blocks[first:], tower.heads, rows)
    return run.pool(x, tower.norm, tower.pool, rows)


def run_to_block(tower: VisionTower, x: Tensor, run: TowerPass, stop: int) -> Tensor:
    """(B, L, dim) input of the first block -> (B, L, dim) input of block number `stop`."""
    return run.some_blocks(x.flatten(0, 1), tower.blocks[:stop], tower.heads, _images(x)).view(x.shape)


def _images(x: Tensor) -> WholeRows:
    return WholeRows(x.shape[0], x.shape[1], x.device)


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply an activation elementwise, in the type of `x`."""
    if kind == "quick_gelu":
        y: Tensor = _QuickGelu.apply(x)
        return y
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class _QuickGelu(torch.autograd.Function):
    """x·σ(1.702·x) through SiLU, which is one pass forward and one back, where the formula takes five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        steep = x * _SLOPE
        ctx.save_for_backward(steep)
        return F.silu(steep).mul_(1 / _SLOPE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (steep,) = ctx.saved_tensors
        grad_x: Tensor = torch.ops.aten.silu_backward(grad, steep)
        return grad_x
