"""Turn the seconds of steps and epochs into comparable training times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Runs, Spread, Values, peak, spread
from benchmarks.report import Table, megabytes, short, with_spread
from benchmarks.settings import Settings


@dataclass(frozen=True)
class Times:
    """Seconds of a contestant over its rounds.

    Attributes:
        first: the first epoch from cold: what is encoded once is encoded in it.
        later: an epoch after that.
        run: `Settings.epochs` epochs from cold to the saved result.
    """

    first: Spread
    later: Spread
    run: Spread


def times(runs: Sequence[Values], settings: Settings) -> Times:
    """Collect the times of a contestant over its repeats."""
    each = [_times_of(values, settings) for values in runs]
    first, later, run = (spread(column) for column in zip(*each, strict=True))
    return Times(first, later, run)


def _times_of(values: Values, settings: Settings) -> tuple[float, float, float]:
    """Return first epoch, later epoch and whole run; what was not run is scaled."""
    if "epoch_seconds" not in values:
        epoch = statistics.median(values["step_seconds"]) * settings.steps_per_epoch
        return epoch, epoch, epoch * settings.epochs
    first, *rest = values["epoch_seconds"]
    later = statistics.median(rest)
    around = values["run_seconds"] - sum(values["epoch_seconds"])
    if len(rest) + 1 == settings.epochs:
        return first, later, values["run_seconds"]
    return first, later, first + later * (settings.epochs - 1) + around


def training_table(runs: Runs, settings: Settings, reference: str) -> Table:
    """Tabulate the times of all contestants, their ratio to `reference`, memory, and a loss to compare."""
    found = {name: times(values, settings) for name, values in runs.items()}
    base = found.get(reference)
    step = _steps_of_all(runs)
    columns = (
        "contestant",
        "first epoch, s",
        "later epoch, s",
        f"{settings.epochs} epochs from cold, s",
        "ratio of these",
        "ratio of later epochs",
        "peak MB",
        "with loading",
        f"loss at step {step}",
    )
    rows = [
        (
            name,
            with_spread(mine.first),
            with_spread(mine.later),
            with_spread(mine.run),
            _ratio(mine.run, base.run if base else None),
            _ratio(mine.later, base.later if base else None),
            megabytes(peak(runs[name])),
            megabytes(peak(runs[name], "peak_with_loading_bytes")),
            f"{runs[name][0]['losses'][step - 1]:.4f}",
        )
        for name, mine in found.items()
    ]
    return Table(columns, tuple(rows))


def step_table(runs: Runs, reference: str) -> Table:
    """Tabulate seconds a step of all contestants, their ratio to `reference`, memory, and a loss."""
    found = {name: step_seconds(values) for name, values in runs.items()}
    step = _steps_of_all(runs)
    columns = ("contestant", "step, s", "ratio", "peak MB", "with loading", f"loss at step {step}")
    rows = [
        (
            name,
            with_spread(mine),
            _ratio(mine, found.get(reference)),
            megabytes(peak(runs[name])),
            megabytes(peak(runs[name], "peak_with_loading_bytes")),
            f"{runs[name][0]['losses'][step - 1]:.4f}",
        )
        for name, mine in found.items()
    ]
    return Table(columns, tuple(rows))


def step_seconds(runs: Sequence[Values]) -> Spread:
    """Summarise each round's median step."""
    return spread([statistics.median(values["step_seconds"]) for values in runs])


def step_ratio(runs: Runs, ours: str, peer: str) -> float | None:
    """Return how many times longer a step of the peer takes."""
    if ours not in runs or peer not in runs:
        return None
    return step_seconds(runs[peer]).median / step_seconds(runs[ours]).median


def _steps_of_all(runs: Runs) -> int:
    """Return how many steps every contestant has run."""
    return min(len(values["losses"]) for repeats in runs.values() for values in repeats)


def _ratio(mine: Spread, base: Spread | None) -> str:
    return f"{short(mine.median / base.median)}x" if base else ""


def run_ratio(runs: Runs, settings: Settings, ours: str, peer: str) -> float | None:
    """Return how many times longer the run of the peer takes."""
    if ours not in runs or peer not in runs:
        return None
    return times(runs[peer], settings).run.median / times(runs[ours], settings).run.median


def later_ratio(runs: Runs, settings: Settings, ours: str, peer: str) -> float | None:
    """Return how many times longer an epoch after the first takes for the peer."""
    if ours not in runs or peer not in runs:
        return None
    return times(runs[peer], settings).later.median / times(runs[ours], settings).later.median


def memory_ratio(runs: Runs, ours: str, peer: str) -> float | None:
    """Return our peak memory as a share of the peer's."""
    if ours not in runs or peer not in runs:
        return None
    return peak(runs[ours]) / peak(runs[peer])


def fastest(runs: Runs, settings: Settings, names: Sequence[str]) -> str | None:
    """Name the setting of a peer with the shortest run."""
    there = [name for name in names if name in runs]
    return min(there, key=lambda name: times(runs[name], settings).run.median, default=None)
