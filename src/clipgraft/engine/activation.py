"""The activations of CLIP's MLPs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.models.anatomy import Activation

_SLOPE = 1.702


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Elementwise, in the type of `x`."""
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
