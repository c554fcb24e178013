"""Linear maps in 8-bit integers: half the bits of bf16, which a CPU with VNNI multiplies twice as fast.

A weight has one scale for each output, measured once. An activation has one scale for each row, measured at
every product, so that what comes of a row depends on that row alone. Both are symmetric around 0. Products
are summed in 32 bits; what is left of a product in bf16 is the scale of its row and the bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipgraft.engine.attention import best_seconds
from clipgraft.errors import ModelError

_WEIGHT_TOP = 127
# One below the top: a scale that bf16 rounds down must not push the largest element over it.
_ROW_TOP = 126
_MIDDLE = 128
_LEAST = 1e-30
"""Stands in for the scale of a row of zeros, which any positive one would do for."""
_PROBE = 192


class Int8Weight:
    """A frozen (out, in) weight and its bias, for products without gradients.

    Attributes:
        shape: (out, in).
    """

    def __init__(
        self,
        pieces: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        copied: Callable[[], None] = lambda: None,
    ) -> None:
        """`pieces` of W lie one below the other; `copied` is called when a packed copy of them was made."""
        weight = torch.cat([piece.float() for piece in pieces])
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self._scales = weight.abs().amax(1).clamp_(min=_LEAST) / _WEIGHT_TOP
        rounded = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(self.shape[0], dtype=torch.int32)
        given = [
            torch.zeros(piece.shape[0]) if bias is None else bias.float()
            for piece, bias in zip(pieces, biases, strict=True)
        ]
        self._bias = torch.cat(given).to(torch.bfloat16)
        copied()

    def forward(self, x: Tensor) -> Tensor:
        """bf16 (N, in) -> bf16 (N, out), about x·Wᵀ + b."""
        scales = x.abs().amax(1, keepdim=True).div_(_ROW_TOP).clamp_(min=_LEAST)
        rounded = x.div(scales).round_().to(torch.int8)
        # Plus 128: oneDNN multiplies signed numbers by signed ones a thousand times slower.
        rounded = rounded.view(torch.uint8).bitwise_xor_(_MIDDLE)
        product = self._product(rounded)
        # In place: pages of a new tensor of this size cost several times what the operation does.
        return torch.addcmul(self._bias, product, scales, out=product)

    def backward(self, grad: Tensor) -> Tensor:
        """Refuse: rounding has no gradient."""
        raise ModelError("int8 weights have no gradients: train in bf16 or fp32")

    def _product(self, rounded: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            _MIDDLE,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        return product


@functools.cache
def int8_works() -> bool:
    """Whether this CPU has VNNI, and this torch multiplies by it, quickly and to the right sums.

    Without VNNI oneDNN adds pairs of products in 16 bits, which can overflow. The operators are those that
    torch's own compiler emits; they are not promised to stay as they are, nor to have a fast kernel.
    """
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    numbers = torch.arange(_PROBE * _PROBE).remainder(253).sub(_ROW_TOP).view(_PROBE, _PROBE)
    x, weight = numbers.to(torch.bfloat16), numbers.flip(0, 1).to(torch.bfloat16)
    try:
        prepared = Int8Weight([weight], [None])
        found = prepared.forward(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = x.float() @ weight.float().T
    close = (found.float() - exact).abs().max() <= 0.02 * exact.abs().max()
    return bool(close) and best_seconds(lambda: prepared.forward(x)) < 10 * best_seconds(lambda: x @ weight.T)


def require_int8(device: torch.device) -> None:
    """Raise ModelError where int8 cannot be computed, or would be slower than bf16."""
    if device.type != "cpu":
        raise ModelError(f"int8 is computed on CPUs only, not on {device}: leave it out, or use the CPU")
    if not int8_works():
        raise ModelError(
            "int8 needs a CPU with VNNI (AVX-512 or AVX-VNNI) and torch's oneDNN operators: leave it out"
        )
