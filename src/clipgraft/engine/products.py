"""Multiplying by a weight that does not change, forward and back."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Frozen:
    """A frozen (out, in) weight W with its bias.

    Where that is supported, W and Wᵀ are kept in the blocked layout of oneDNN: torch brings a plain weight
    into it at every product, which costs a fifth of the product for a batch of captions. Wᵀ is packed when it
    is first needed, which in inference is never.

    Attributes:
        shape: (out, in).
        packs: whether the blocked layout is used.
    """

    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None) -> None:
        """`weight` makes W in the compute type, whenever it is called."""
        plain = weight()
        self.shape: tuple[int, int] = (plain.shape[0], plain.shape[1])
        self.packs = plain.device.type == "cpu" and plain.dtype == torch.bfloat16 and packing_works()
        self._make = weight
        self._bias = bias
        self._weight = _packed(plain) if self.packs else plain
        self._transposed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, (N, in) -> (N, out)."""
        if self.packs:
            return _packed_product(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def backward(self, grad: Tensor) -> Tensor:
        """g·W, (N, out) -> (N, in)."""
        if not self.packs:
            return grad @ self._weight
        if self._transposed is None:
            self._transposed = _packed(self._make().T)
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


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
