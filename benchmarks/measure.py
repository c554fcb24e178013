"""Run contestants in turn, each in a new process, and collect their results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.settings import ROOT, Settings

Values: TypeAlias = dict[str, Any]
Runs: TypeAlias = Mapping[str, Sequence[Values]]
"""What every contestant of a case measured, one entry a repeat; a contestant that failed is not in it."""

_TIMEOUT = 1800


@dataclass(frozen=True)
class Contestant:
    """One program in the comparison.

    Attributes:
        name: as the tables call it.
        function: `module:function` in `benchmarks`.
        options: its arguments.
        repeats: at most so many rounds.
    """

    name: str
    function: str
    options: Values = field(default_factory=dict)
    repeats: int = 99


class ContestantError(RuntimeError):
    """Raised when the process of a contestant ends without a result."""


def run_contestant(contestant: Contestant, threads: int) -> Values:
    """Run a contestant in its own process and return its values.

    Raises:
        ContestantError: with the last line that it wrote.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.child"]
        command += [f"benchmarks.{contestant.function}", json.dumps(contestant.options), str(result)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT.parent,
                env={**os.environ, **_environment(threads, folder)},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ContestantError(f"{contestant.name}: stopped after {_TIMEOUT} s") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ContestantError(f"{contestant.name}: exit {done.returncode}: {last.strip()}")
        values: Values = json.loads(result.read_text(encoding="utf-8"))
    return {**values, "load_before": load}


def _environment(threads: int, empty: str) -> dict[str, str]:
    """Give all contestants the same threads, no network, no GPU, no output and an empty cache."""
    return {
        "CLIPGRAFT_CACHE": empty,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def measure(
    contestants: Sequence[Contestant],
    settings: Settings,
    threads: int,
    tell: Callable[[str], None],
) -> tuple[dict[str, list[Values]], list[str]]:
    """Run rounds of all contestants, A B C A B C, so that a slow minute of the machine affects all.

    Returns:
        The values of every repeat, and what went wrong, one line each.
    """
    found: dict[str, list[Values]] = {}
    failed: dict[str, str] = {}
    for turn in range(settings.repeats):
        for contestant in contestants:
            if turn >= contestant.repeats or contestant.name in failed:
                continue
            try:
                values = run_contestant(contestant, threads)
            except ContestantError as error:
                failed[contestant.name] = str(error)
                found.pop(contestant.name, None)
                tell(f"  FAILED {error}")
                continue
            found.setdefault(contestant.name, []).append(values)
            tell(f"  {contestant.name}: {values['process_seconds']:.0f} s")
    return found, list(failed.values())


def best_and_median(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the middle value."""
    return min(numbers), statistics.median(numbers)


def peak(runs: Sequence[Values], key: str = "peak_bytes") -> float:
    """Return the largest peak of all repeats."""
    return float(max(values[key] for values in runs))
