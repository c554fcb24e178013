"""Multiplying by a weight that does not change, forward and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Frozen:
    """A frozen (out, in) weight.

    `packed` and `packed_t` hold W and Wᵀ in the blocked layout of oneDNN, where that is supported: torch
    brings a plain weight into it at every product, which costs a fifth of the product for a caption batch.

    Attributes:
        weight: plain; None where the packed ones stand for it.
        bias: (out,) or None.
    """

    shape: tuple[int, int]
    weight: Tensor | None
    bias: Tensor | None
    packed: Tensor | None = None
    packed_t: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, (N, in) -> (N, out)."""
        if self.packed is not None:
            return _packed_product(x, self.packed, self.bias)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """g·W, (N, out) -> (N, in)."""
        if self.packed_t is not None:
            return _packed_product(grad, self.packed_t, None)
        assert self.weight is not None
        return grad @ self.weight


def freeze(weight: Tensor, bias: Tensor | None) -> Frozen:
    """Prepare a weight for repeated products in its own type."""
    out, inner = weight.shape
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works():
        return Frozen((out, inner), None, bias, _packed(weight), _packed(weight.T.contiguous()))
    return Frozen((out, inner), weight, bias)


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
