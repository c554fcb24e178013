"""Measure a device: whether it is fast at bf16, and the largest memory that a stretch of work took."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

log = logging.getLogger("clipgraft")
_SIZE, _REPEATS, _WORTH_IT = 512, 5, 1.3


@functools.cache
def bf16_speed(device: torch.device) -> float:
    """How many times as fast as fp32 matrices a CPU multiplies bf16 ones; takes a few milliseconds, once."""
    return _matmul_seconds(device, torch.float32) / _matmul_seconds(device, torch.bfloat16)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a CPU multiplies bf16 matrices a third faster than fp32 ones, or a GPU has units for them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bf16_speed(device) > _WORTH_IT


def use_autocast(choice: bool | None, device: torch.device) -> bool:
    """Whether to compute features in bf16: as chosen, or with None ("auto") where the device is fast at it.

    bf16 autocast keeps features within cosine 0.999 of float32's. What None came to is logged.
    """
    if choice is not None:
        return choice
    fast = bf16_is_fast(device)
    other, why = ("fp32", "for full precision") if fast else ("amp_bf16", "to do so all the same")
    log.info("%s; `precision='%s'` %s", what_auto_chooses(device), other, why)
    return fast


def what_auto_chooses(device: torch.device) -> str:
    """In words, with the reason: "computing in bf16: this CPU multiplies it 4.2 times as fast as fp32"."""
    fast = bf16_is_fast(device)
    if device.type == "cuda":
        return f"computing in {'bf16: this GPU has' if fast else 'fp32: this GPU lacks'} units for bf16"
    speed = f"{bf16_speed(device):.1f} times as fast"
    if fast:
        return f"computing in bf16: this CPU multiplies it {speed} as fp32"
    return f"computing in fp32: this CPU multiplies bf16 only {speed}"


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few (512, 512) products, the first of which warms up."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _ = matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return min(seconds)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Gives what tells, in MB, the most resident memory this process has had since; None where none can say.

    Linux keeps the mark, and lets a process reset its own. What earlier work freed is given back first, so
    that a stretch is not charged for it.
    """
    known = _reset()
    yield lambda: _high_water() if known else None


def _reset() -> bool:
    if not _CLEAR.exists():
        return False
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone keeps what is freed
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> float | None:
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(match[1]) / 1000 if match else None
