"""Measure what a model takes on this machine, beside what the machine can do."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from clipgraft.models.clip import Clip
from clipgraft.models.device import peak_memory, synchronize
from clipgraft.models.sites import Tower
from clipgraft.profile.forward import ClipProfile, TowerCost


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the median wall-clock seconds of a call without gradients, after one warm-up call."""
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


_REPEATS, _MATRIX = 7, 1024


@dataclass(frozen=True)
class TowerTime:
    """One tower on a batch.

    Attributes:
        tower: which.
        seconds: median of a forward pass.
        rows_per_second: images or texts.
        flops_per_second: floating-point operations of the profile in that time.
        of_matmul: that as a share of what a large matrix product reached in the same run.
    """

    tower: Tower
    seconds: float
    rows_per_second: float
    flops_per_second: float
    of_matmul: float


@dataclass(frozen=True)
class Measurement:
    """A run on this machine.

    Attributes:
        device: where.
        dtype: type of the weights.
        threads: of the CPU.
        matmul_flops_per_second: of a product of two square matrices of `matrix` rows in that type.
        matrix: their rows.
        peak_megabytes: most memory of the process, weights included, or of the GPU; None where none can say.
        text, vision: the towers; None where there is none, or a table of features.
    """

    device: str
    dtype: str
    threads: int
    matmul_flops_per_second: float
    matrix: int
    peak_megabytes: float | None
    text: TowerTime | None
    vision: TowerTime | None

    @property
    def towers(self) -> tuple[TowerTime, ...]:
        """Those that there are: both, or the one of a tower alone."""
        return tuple(tower for tower in (self.text, self.vision) if tower is not None)


def measure(clip: Clip, profile: ClipProfile) -> Measurement:
    """Run the towers of a model with weights on inputs of a profile's sizes, without gradients."""
    matrix = torch.randn(_MATRIX, _MATRIX, device=clip.device).to(clip.dtype)
    fastest = 2 * _MATRIX**3 / median_seconds(lambda: matrix @ matrix, clip.device)
    clip.eval()
    with _peak(clip.device) as peak:
        towers = {cost.tower: _tower_time(clip, cost, fastest) for cost in profile.towers}
        most = peak()
    return Measurement(
        device=str(clip.device),
        dtype=str(clip.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        matmul_flops_per_second=fastest,
        matrix=_MATRIX,
        peak_megabytes=most,
        text=towers.get("text"),
        vision=towers.get("vision"),
    )


def _tower_time(clip: Clip, cost: TowerCost, fastest: float) -> TowerTime:
    shape, tower, device, family = cost.input_shape, cost.tower, clip.device, clip.family
    if tower == "text":
        inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        call = partial(family.encode_text, clip.model, inputs)
    else:
        inputs = torch.randn(shape, device=device, dtype=clip.dtype)
        call = partial(family.encode_image, clip.model, inputs)
    seconds = median_seconds(call, device, _REPEATS)
    speed = cost.trace.total.flops / seconds
    return TowerTime(tower, seconds, len(inputs) / seconds, speed, speed / fastest)


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the peak memory since then, in MB."""
    if device.type != "cuda":
        with peak_memory() as peak:
            yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) / 1e6
