"""How long a call takes, on whichever device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median wall-clock seconds of a call without gradients, after one that warms up."""
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    """GPUs answer before they are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
