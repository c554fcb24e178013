"""What differs between devices: copies to them, their random streams, whether bf16 is fast, memory taken."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.process_memory import trim_heap

log = logging.getLogger("clipgraft")
_SIZE, _REPEATS, _WORTH_IT = 512, 5, 1.3


_SHARES_MEMORY = ("cpu", "mps", "meta")


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a copy from the CPU to a GPU is queued there, not waited for.

    A plain `tensor.to(device)` waits until the GPU has done all that was queued before.
    """
    if tensor.device.type != "cpu" or device.type in _SHARES_MEMORY:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that was queued, which calls do not: they return before they are done."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type not in _SHARES_MEMORY:
        torch.get_device_module(device).synchronize(device)


def accelerator_random() -> list[Tensor]:
    """The state of the random stream of every GPU, of any make, that torch sees; none without one."""
    module = _accelerator()
    return [] if module is None else [module.get_rng_state(*which) for which in _numbers(module)]


def set_accelerator_random(states: Sequence[Tensor]) -> None:
    """Put the random streams of GPUs into states of `accelerator_random`, as many as there are GPUs for.

    Raises:
        RuntimeError, TypeError: a state is none.
    """
    module = _accelerator()
    if module is not None:
        for state, which in zip(states, _numbers(module), strict=False):
            module.set_rng_state(state, *which)


def _accelerator() -> Any:
    """The module of the kind of GPU that torch sees, `torch.cuda` or another; None without one."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return None if kind is None else torch.get_device_module(kind)


def _numbers(module: Any) -> list[tuple[int, ...]]:
    """What names each GPU of a kind to its own module; Apple's is the only one and has no number."""
    return [()] if module is getattr(torch, "mps", None) else [(n,) for n in range(module.device_count())]


@functools.cache
def bf16_speed(device: torch.device) -> float:
    """How many times as fast as fp32 matrices a device multiplies bf16 ones; takes milliseconds, once."""
    return _matmul_seconds(device, torch.float32) / _matmul_seconds(device, torch.bfloat16)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices a third faster than fp32 ones, or whether CUDA has units."""
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
    speed, name = f"{bf16_speed(device):.1f} times as fast", device.type.upper()
    if fast:
        return f"computing in bf16: this {name} multiplies it {speed} as fp32"
    return f"computing in fp32: this {name} multiplies bf16 only {speed}"


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few (512, 512) products, the first of which warms up."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _ = matrix @ matrix
        synchronize(device)
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
    trim_heap()
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
