"""Measure how fast a device multiplies matrices, in well under a second a kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("fp32", "bf16", "int8")
_SIDES = (256, 512, 1024, 2048, 4096)
_ENOUGH = 0.03  # seconds of one product: a larger one would not be told apart better
_ROUNDS = 0.25  # seconds of repetitions, of which the fastest counts


def gigaflops(kind: str, device: str) -> float:
    """Return 10⁹ operations a second of the fastest product: two for each multiply-add.

    Sides double until a product takes long enough to be timed, so that a slow machine does not wait.

    Args:
        kind: fp32, bf16, or int8 with sums in int32.
        device: torch's name of it.
    """
    best = 0.0
    for side in _SIDES:
        multiply = _product(kind, device, side)
        _seconds(multiply, device)  # the first one loads kernels
        took = _seconds(multiply, device)
        best = max(best, 2e-9 * side**3 / took)
        if took > _ENOUGH:
            break
    end = time.perf_counter() + _ROUNDS
    while time.perf_counter() < end:
        best = max(best, 2e-9 * side**3 / _seconds(multiply, device))
    return best


def _product(kind: str, device: str, side: int) -> Callable[[], torch.Tensor]:
    import torch

    if kind == "int8":
        a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: x @ y


def _seconds(multiply: Callable[[], torch.Tensor], device: str) -> float:
    """The time of a product, and not of queuing it."""
    _wait(device)
    started = time.perf_counter()
    multiply()
    _wait(device)
    return max(time.perf_counter() - started, 1e-9)


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()
