"""Run contestants in turn, each in a new process, and collect their results."""

from __future__ import annotations

import functools
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

from benchmarks.noise import Watch
from benchmarks.settings import ROOT

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


def run_contestant(contestant: Contestant, threads: int, timeout: float = _TIMEOUT) -> Values:
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
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ContestantError(f"{contestant.name}: stopped after {timeout:g} s") from error
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
    rounds: int,
    run: Callable[[Contestant], Values],
    watch: Watch,
    tell: Callable[[str], None],
) -> tuple[dict[str, list[Values]], list[str]]:
    """Run rounds of all contestants, A B C A B C, so that a slow minute of the machine affects all.

    Args:
        contestants: in their order in a round.
        rounds: at most; a contestant may take part in fewer.
        run: what runs one of them, such as `run_contestant`.
        watch: repeats those that the machine disturbed.
        tell: is told every result.

    Returns:
        The values of every repeat, and what went wrong, one line each.
    """
    found: dict[str, list[Values]] = {}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for contestant in contestants:
            if turn >= contestant.repeats or contestant.name in failed:
                continue
            try:
                values = watch.run(contestant.name, functools.partial(run, contestant))
            except ContestantError as error:
                failed[contestant.name] = str(error)
                found.pop(contestant.name, None)
                tell(f"  FAILED {error}")
                continue
            found.setdefault(contestant.name, []).append(values)
            tell(f"  {contestant.name}: {values['process_seconds']:.0f} s")
    return found, list(failed.values())


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, the lowest and the highest, and how many there were."""

    median: float
    low: float
    high: float
    count: int


def spread(numbers: Sequence[float]) -> Spread:
    """Summarise one or more measurements of the same thing."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers), len(numbers))


def peak(runs: Sequence[Values], key: str = "peak_bytes") -> float:
    """Return the largest peak of all repeats."""
    return float(max(values[key] for values in runs))
