"""A linear map with the low-rank updates of all its parts, as one operation.

    y = x·Wᵀ + b + (m ⊙ x)·Aᵀ·Bᵀ

A stacks the A of every updated part (q, k and v share one product) and B is their block-diagonal, scale
included; m is the dropout mask, shared by the parts. A frozen W has no gradient and no copy of x. What
variants that rescale, and trained biases, make of y is one factor and one addend for each output.

`WeightCache` has the base's weights in the compute type: frozen ones are prepared once, trained ones at every
use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.engine.quantized import Int8Weight
from clipgraft.lora.layers import LoraLayer
from clipgraft.models.architecture import Linear, Part
from clipgraft.models.sites import Site, Tower
from clipgraft.process_memory import drop_mapped

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


class FrozenWeight:
    """A frozen (out, in) weight W with its bias, in one piece or in several, one below the other.

    Where that is asked for and supported, W and Wᵀ are kept in the blocked layout of oneDNN: torch brings a
    plain weight into it at every product, which costs a fifth of the product for a batch of captions. Wᵀ is
    packed when it is first needed, which in inference is never.

    Attributes:
        shape: (out, in).
        packs: whether the blocked layout is used.
    """

    def __init__(
        self,
        weights: Callable[[], list[Tensor]],
        biases: Sequence[Tensor | None],
        pack: bool = True,
        copied: Callable[[], None] = lambda: None,
    ) -> None:
        """`weights` returns the pieces of W in the compute type at every call.

        `copied` is called when a packed copy of all of them was made.
        """
        pieces = weights()
        first = pieces[0]
        self.shape: tuple[int, int] = (sum(piece.shape[0] for piece in pieces), first.shape[1])
        self.packs = pack and first.device.type == "cpu" and first.dtype == torch.bfloat16 and packing_works()
        self._make, self._copied = weights, copied
        self._pieces = [_packed(torch.cat(pieces))] if self.packs else pieces
        self._biases = [_joined(biases)] if self.packs else list(biases)
        self._transposed: Tensor | None = None
        if self.packs:
            copied()

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, (N, in) -> (N, out)."""
        if self.packs:
            return _packed_product(x, self._pieces[0], self._biases[0])
        parts = [F.linear(x, w, b) for w, b in zip(self._pieces, self._biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def backward(self, grad: Tensor) -> Tensor:
        """g·W, (N, out) -> (N, in)."""
        if not self.packs:
            columns = torch.split(grad, [piece.shape[0] for piece in self._pieces], dim=1)
            total: Tensor = columns[0] @ self._pieces[0]
            for column, piece in zip(columns[1:], self._pieces[1:], strict=True):
                total.addmm_(column, piece)
            return total
        if self._transposed is None:
            self._transposed = _packed(torch.cat(self._make()).T)
            self._copied()
        return _packed_product(grad, self._transposed, None)


class WeightCache:
    """Base weights in one compute type; those of frozen weights are kept.

    Of weights that are stored in that type already nothing is copied, unless `pack` lets them be brought into
    a faster layout.
    """

    def __init__(self, dtype: torch.dtype, pack: bool = True, int8: bool = False) -> None:
        """With `int8` frozen weights of blocks are kept, and multiplied, in 8 bits."""
        self.dtype = dtype
        self._pack, self._int8 = pack, int8
        self._kept: dict[tuple[Site, ...], tuple[Hashable, FrozenWeight | Int8Weight]] = {}

    def frozen(self, linear: Linear) -> FrozenWeight | Int8Weight | None:
        """Return a linear map prepared for products; None if one of its weights needs a gradient."""
        sources = [t for part in linear for t in (part.weight, part.bias) if t is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
            return None
        # An optimiser or load_state_dict writes in place, and a move to another device replaces the storage.
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in sources)
        key = tuple(part.site for part in linear)
        known = self._kept.get(key)
        if known is None or known[0] != state:
            known = (state, self._prepare(linear))
            self._kept[key] = known
        return known[1]

    def stacked(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The (out, in) weight and (out,) bias of a map, its parts stacked by rows; differentiable."""
        pieces, biases = self._pieces(linear, self.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), _joined(biases)

    def forget(self, tower: Tower) -> None:
        """Free the prepared weights of a tower; they are prepared again at their next use."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0].tower != tower}

    def _prepare(self, linear: Linear) -> FrozenWeight | Int8Weight:
        # Not inference tensors, even in inference mode: training may use them later.
        def detached(dtype: torch.dtype = self.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
            with torch.inference_mode(False), torch.no_grad():
                pieces, biases = self._pieces(linear, dtype)
                return [p.detach() for p in pieces], [None if b is None else b.detach() for b in biases]

        def copied() -> None:
            drop_mapped(part.weight for part in linear)

        # What the first product of a tower loses, all others see; it is a small one.
        if self._int8 and linear[0].site.block is not None:
            return Int8Weight(*detached(torch.float32), copied)
        return FrozenWeight(lambda: detached()[0], detached()[1], self._pack, copied)

    @staticmethod
    def _pieces(linear: Linear, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
        """The weights and biases of a map in a type; fused neighbours are one piece."""
        first, last = linear[0], linear[-1]
        if first.rows is not None and last.rows is not None:
            rows = slice(first.rows.start, last.rows.stop)
            bias = None if first.bias is None else first.bias[rows]
            sources = [(first.weight[rows], bias)]
        else:
            sources = [(part.matrix.flatten(1), part.bias) for part in linear]
        weights = [weight.to(dtype) for weight, _ in sources]
        return weights, [None if bias is None else bias.to(dtype) for _, bias in sources]


@functools.cache
def packing_works() -> bool:
    """Whether this torch can pack bf16 weights, and multiplies by them to the same bits as by plain ones.

    The operators are those that torch's own compiler emits; they are not promised to stay as they are.
    """
    x, weight, bias = (torch.linspace(-1, 1, n).to(torch.bfloat16) for n in (3 * 16, 32 * 16, 32))
    x, weight = x.view(3, 16), weight.view(32, 16)
    try:
        return torch.equal(_packed_product(x, _packed(weight), bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if len(given) == 1:
        return given[0]
    return torch.cat(given) if given else None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@dataclass(frozen=True)
class Update:
    """A low-rank update, the part of the base that it changes, and the outputs of that."""

    layer: LoraLayer
    part: Part
    rows: slice


def frozen_linear(x: Tensor, frozen: FrozenWeight | Int8Weight, updates: list[Update]) -> Tensor:
    """(N, in) -> (N, out) through a frozen map, in the type of `x`."""
    mask, spans, factors = _low_rank(x, updates)
    y: Tensor = _FrozenLinear.apply(x, frozen, mask, spans, *factors)
    return rescale(y, updates)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[Update]) -> Tensor:
    """The same through a map whose weights may train, in steps that autograd differentiates."""
    y = F.linear(x, weight, bias)
    mask, spans, factors = _low_rank(x, updates)
    if spans:
        a, b = stack(factors, spans, weight.shape[0], x.dtype)
        y = y + F.linear(F.linear(x if mask is None else masked(x, mask), a), b)
    return rescale(y, updates)


def rescale(y: Tensor, updates: list[Update]) -> Tensor:
    """(N, out) times what variants rescale by, all but the bias, plus trained biases."""
    found = rescaling(updates, y.shape[1])
    if found is None:
        return y
    factor, addend = found
    return torch.addcmul(addend.to(y.dtype), y, factor.to(y.dtype))


def rescaling(updates: Sequence[Update], out: int) -> tuple[Tensor, Tensor] | None:
    """The factor and the addend of each of `out` outputs, fp32; None where no update has either."""
    if all(update.layer.is_plain for update in updates):
        return None
    device = updates[0].part.matrix.device
    factors, addends = [], []
    start = 0
    for update in updates:
        factor, addend = _rescaling(update)
        width = update.rows.stop - update.rows.start
        before = update.rows.start - start
        factors += [torch.ones(before, device=device), factor.expand(width)]
        addends += [torch.zeros(before, device=device), addend.expand(width)]
        start = update.rows.stop
    factors.append(torch.ones(out - start, device=device))
    addends.append(torch.zeros(out - start, device=device))
    return torch.cat(factors), torch.cat(addends)


def _rescaling(update: Update) -> tuple[Tensor, Tensor]:
    """Return a factor and an addend, fp32, of each output or of one element for all."""
    layer, offset = update.layer, update.part.offset
    weight = update.part.matrix
    factor = addend = torch.zeros(1, device=weight.device)
    if not layer.rescales:
        factor = factor + 1
    else:
        factor = layer.rescale(weight)
        if offset is not None:
            addend = offset.float() * (1 - factor)
    return factor, addend if layer.lora_bias is None else addend + layer.lora_bias


FactorSpan = tuple[slice, int, float]
"""Rows of the output, rank, and scale of one update."""


def _low_rank(x: Tensor, updates: list[Update]) -> tuple[Tensor | None, list[FactorSpan], list[Tensor]]:
    """Return the dropout mask, and A and B of every update with the rows and scale of each."""
    spans, factors = low_rank_factors(updates)
    if not spans or not updates[0].layer.dropout or not updates[0].layer.training:
        return None, spans, factors
    mask, kept = random_mask(x, updates[0].layer.dropout)
    return mask, [(rows, r, scale / kept) for rows, r, scale in spans], factors


def low_rank_factors(updates: list[Update]) -> tuple[list[FactorSpan], list[Tensor]]:
    """Return A and B, (r, in) and (out, r), of every update of rank above 0, and the outputs of each."""
    ranked = [update for update in updates if update.layer.r]
    factors = [f.flatten(1) for update in ranked for f in update.layer.factors()]
    ranks = [a.shape[0] for a in factors[0::2]]
    spans = [(update.rows, r, update.layer.scaling) for update, r in zip(ranked, ranks, strict=True)]
    return spans, factors


class _FrozenLinear(torch.autograd.Function):
    """The operation above; gradients go to x and to the factors alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenWeight | Int8Weight,
        mask: Tensor | None,
        spans: list[FactorSpan],
        *factors: Tensor,
    ) -> Tensor:
        ctx.frozen, ctx.spans = frozen, spans
        y = frozen.forward(x)
        if factors:
            a, b = stack(list(factors), spans, frozen.shape[0], x.dtype)
            # Only the dropped input is needed again.
            dropped = x if mask is None else masked(x, mask)
            low = F.linear(dropped, a)
            ctx.save_for_backward(dropped, mask, low, a, b)
            y.addmm_(low, b.T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = ctx.frozen.backward(grad) if ctx.needs_input_grad[0] else None
        if not ctx.spans:
            return grad_x, None, None, None
        dropped, mask, low, a, b = ctx.saved_tensors
        grad_low = grad @ b
        if grad_x is not None and mask is None:
            grad_x.addmm_(grad_low, a)
        elif grad_x is not None:
            grad_x += masked(grad_low @ a, mask)
        return grad_x, None, None, None, *_factor_grads(ctx.spans, grad_low.T @ dropped, grad.T @ low)


def _factor_grads(spans: list[FactorSpan], grad_a: Tensor, grad_b: Tensor) -> list[Tensor]:
    """Gradients of each A and B out of those of the stacked ones, in at least fp32."""
    wide = torch.promote_types(grad_a.dtype, torch.float32)
    grads, column = [], 0
    for rows, r, scale in spans:
        columns = slice(column, column + r)
        grads += [grad_a[columns].to(wide), grad_b[rows, columns].to(wide) * scale]
        column += r
    return grads


def stack(
    factors: list[Tensor], spans: list[FactorSpan], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A of (Σr, in), and the block-diagonal B of (out, Σr) with the scales in it."""
    a = torch.cat(factors[0::2]).to(dtype)
    columns = [
        F.pad(factor * scale, (0, 0, rows.start, out - rows.stop))
        for factor, (rows, _, scale) in zip(factors[1::2], spans, strict=True)
    ]
    return a, torch.cat(columns, dim=1).to(dtype)


# torch draws a Bernoulli number for each element, one after another. Here one random byte decides, and the
# mask is applied as a bitwise and, for which a float is its bits: a tenth of the price on a CPU.


def random_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask for `masked`, and the share of elements that it keeps on average.

    On the CPU p is rounded to the nearest 1/256 from 1/256 to 255/256; scale by the share that is returned,
    which is exact.
    """
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) >= p).to(_BITS[x.dtype]).neg_(), 1 - p
    dropped = min(max(round(256 * p), 1), 255)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int8)[: x.numel()].view(x.shape).to(_BITS[x.dtype])
    # Numbers from -128 to 127: what is below the bound turns negative, and its sign fills all bits.
    bits = 8 * x.element_size() - 1
    return numbers.sub_(128 - dropped).bitwise_right_shift_(bits), 1 - dropped / 256


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with zeros where the mask drops."""
    return x.view(mask.dtype).bitwise_and(mask).view(x.dtype)
