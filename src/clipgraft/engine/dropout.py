"""Dropout for a tenth of its usual price on the CPU.

torch draws a Bernoulli number for each element, one after another. Here one random byte decides, and the mask
is applied as a bitwise and, for which a float is its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def random_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask for `masked`, and the share of elements that it keeps on average.

    On the CPU p is rounded to the nearest 1/256 from 1/256 to 255/256; scale by the share that is returned,
    which is exact.
    """
    if x.device.type != "cpu":
        return _as_bits(torch.rand(x.shape, device=x.device) >= p, x), 1 - p
    dropped = min(max(round(256 * p), 1), 255)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int8)[: x.numel()].view(x.shape).to(_BITS[x.dtype])
    # Numbers from -128 to 127: what is below the bound turns negative, and its sign fills all bits.
    bits = 8 * x.element_size() - 1
    return numbers.sub_(128 - dropped).bitwise_right_shift_(bits), 1 - dropped / 256


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where the mask drops."""
    return x.view(mask.dtype).bitwise_and(mask).view(x.dtype)


def _as_bits(keep: Tensor, x: Tensor) -> Tensor:
    return keep.to(_BITS[x.dtype]).neg_()
