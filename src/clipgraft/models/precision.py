"""Which number type a device is fast at, found by measuring rather than by name."""

from __future__ import annotations

import functools
import time

import torch

_SIZE, _REPEATS, _WORTH_IT = 512, 5, 1.3


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether a bf16 matrix product beats fp32 by a third on this device; takes a few milliseconds, once."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _matmul_seconds(device, torch.float32) > _WORTH_IT * _matmul_seconds(device, torch.bfloat16)


def use_autocast(choice: bool | None, device: torch.device) -> bool:
    """Whether to compute features in bf16: as chosen, or with None ("auto") where the device is fast at it.

    For encoding and evaluation, where bf16 autocast keeps features within cosine 0.999 of float32's.
    """
    return bf16_is_fast(device) if choice is None else choice


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few (512, 512) products, the first of which warms up."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _ = matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return min(seconds)
