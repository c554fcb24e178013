"""Self-attention over rows of nodes, with kernels that suit short sequences.

On CPUs the backward pass of torch's scaled-dot-product attention takes many times the time of the few small
products it stands for, when sequences are as short as captions. Which of the two is faster is measured
(`clipgraft.engine.kernels`), not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.engine.packing import Packed

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q of (B, heads, M, D), k and v of (B, heads, L, D), additive fp32 mask that broadcasts -> like q."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own kernel."""
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Two batched products around a softmax in fp32, with the backward pass written out."""
    context: Tensor = _Products.apply(q, k, v, mask)
    return context


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scores = _at_least_fp32(q @ k.transpose(-1, -2))
        scores *= 1 / math.sqrt(q.shape[-1])
        if mask is not None:
            scores += mask
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights.to(q.dtype) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_v = weights.to(q.dtype).transpose(-1, -2) @ grad
        grad_weights = _at_least_fp32(grad @ v.transpose(-1, -2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores = (grad_scores * (1 / math.sqrt(q.shape[-1]))).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, None


def look_up(nodes: Tensor, packed: Packed) -> Tensor:
    """(N, C) nodes -> (M, C) cells.

    Gradients of cells that share a node are summed in fp32. Cells that hold no token have none.
    """
    found: Tensor = _LookUp.apply(nodes, packed)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nodes: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return nodes.index_select(0, packed.cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        packed = ctx.packed
        summed = grad.index_select(0, packed.places)
        summed[packed.count :] = 0
        # bf16 would lose most of what the 64th caption adds to the start token's gradient.
        total = _at_least_fp32(summed.index_select(0, packed.shared))
        total.index_add_(0, packed.slots, grad.index_select(0, packed.repeats).to(total.dtype))
        return summed.index_copy_(0, packed.shared, total.to(grad.dtype)), None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, rows: int, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(rows · L, parts · dim) -> `parts` tensors of (rows, heads, L, dim / heads)."""
    return x.view(rows, -1, parts, heads, x.shape[-1] // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(context: Tensor) -> Tensor:
    """(rows, heads, L, D) -> (rows · L, heads · D)."""
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(L, L) of 0 where a token may look, -inf after it."""
    return torch.full((length, length), -math.inf, device=device).triu(1)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, 1, 1, width) of 0 up to each length and -inf from there on."""
    beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, -math.inf)[:, None, None]
