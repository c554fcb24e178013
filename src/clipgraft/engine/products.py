"""Multiplying by a weight that does not change, forward and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Frozen:
    """A frozen (out, in) weight W with its bias, in one piece or in several, one below the other.

    Where that is asked for and supported, W and Wᵀ are kept in the blocked layout of oneDNN: torch brings a
    plain weight into it at every product, which costs a fifth of the product for a batch of captions. Wᵀ is
    packed when it is first needed, which in inference is never.

    Attributes:
        shape: (out, in).
        packs: whether the blocked layout is used.
    """

    def __init__(
        self, weights: Callable[[], list[Tensor]], biases: Sequence[Tensor | None], pack: bool = True
    ) -> None:
        """`weights` makes the pieces of W in the compute type, whenever it is called."""
        pieces = weights()
        first = pieces[0]
        self.shape: tuple[int, int] = (sum(piece.shape[0] for piece in pieces), first.shape[1])
        self.packs = pack and first.device.type == "cpu" and first.dtype == torch.bfloat16 and packing_works()
        self._make = weights
        self._pieces = [_packed(torch.cat(pieces))] if self.packs else pieces
        self._biases = [_joined(biases)] if self.packs else list(biases)
        self._transposed: Tensor | None = None

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
        return _packed_product(grad, self._transposed, None)


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
    return torch.cat(given) if given else None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
