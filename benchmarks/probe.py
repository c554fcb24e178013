"""Measure the machine's own matmul speed, in a process that waits for a line and answers with one.

A contestant's time says something about the contestant only where the machine was as fast after it as before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from benchmarks.settings import ROOT

Speeds: TypeAlias = dict[str, float]
"""GFLOP/s of a matmul, by number type."""

TYPES = {"fp32": "float32", "bf16": "bfloat16"}
_SIDE, _SECONDS, _FEWEST = 768, 0.15, 3


class Probe:
    """The waiting process; a call measures once, in a fraction of a second."""

    def __init__(self, threads: int) -> None:
        # Threads that spin after a product would take time from the contestant.
        own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.probe"],
            cwd=ROOT.parent,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> Speeds:
        """Measure.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the probe of the machine's speed ended with {self._process.wait()}")
        found: Speeds = json.loads(answer)
        return found

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def speed(product: Callable[[], Any], operations: float, clock: Callable[[], float]) -> float:
    """Return GFLOP/s of a product by its median over a fraction of a second."""
    started = before = clock()
    times: list[float] = []
    while len(times) < _FEWEST or before - started < _SECONDS:
        product()
        now = clock()
        times.append(now - before)
        before = now
    return operations / sorted(times)[len(times) // 2] / 1e9


def _answer() -> None:
    import torch

    factors = {name: torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype)) for name, dtype in TYPES.items()}
    with torch.inference_mode():
        for factor in factors.values():
            factor @ factor
        for _ in sys.stdin:
            found = {
                name: speed(lambda own=factor: own @ own, 2.0 * _SIDE**3, time.perf_counter)  # type: ignore[misc]
                for name, factor in factors.items()
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _answer()
