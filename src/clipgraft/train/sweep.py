"""A grid of runs: which cells it has, what each left behind, and the table of them all."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipgraft.evaluate.bootstrap import Interval
from clipgraft.records import Finite, Whole
from clipgraft.text_tables import Table, with_deviation, with_interval
from clipgraft.train.cells import read_finished

Kind = Literal["base", "lora", "full"]
_GAIN = (
    "gain: R@1 of both directions, or accuracy, above the base in points, with its 95 % interval over the "
    "validation images; of several seeds from the lowest to the highest end."
)


@dataclass(frozen=True)
class Cell:
    """One run of a grid: an adapter on a target set at a rank, full fine-tuning, or the base as it is."""

    kind: Kind
    targets: str = ""
    r: Whole = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder's name, different for every cell of a grid."""
        if self.kind == "base":
            return "base"
        stem = "full" if self.kind == "full" else f"{re.sub(r'[^A-Za-z0-9.+-]', '_', self.targets)}-r{self.r}"
        return f"{stem}-seed{self.seed}"

    @property
    def row(self) -> tuple[Kind, str, int]:
        """What cells of one row of the table share: all but the seed."""
        return self.kind, self.targets, self.r


@dataclass(frozen=True)
class CellResult:
    """What a finished cell left.

    Attributes:
        cell: which it is.
        metrics: after the last epoch.
        trained: number of trained weights.
        bytes: of what was saved.
        seconds: of the run, evaluation included.
        peak_mb: largest resident memory of the process during the run; None where it is not known.
        gain: how much better the run is than the base on the validation data, in shares; None for the base.
    """

    cell: Cell
    metrics: dict[str, Finite]
    trained: Whole = 0
    bytes: Whole = 0
    seconds: Finite = 0.0
    peak_mb: Finite | None = None
    gain: Interval | None = None


@dataclass(frozen=True)
class CellRecord:
    """What `cell.json` holds."""

    settings: dict[str, Any]
    result: CellResult


@dataclass(frozen=True)
class Row:
    """Cells that differ in their seed alone: means and, of metrics, sample deviations."""

    kind: Kind
    targets: str
    r: Whole
    seeds: Whole
    mean: dict[str, Finite]
    deviation: dict[str, Finite]
    trained: Whole
    bytes: Finite
    seconds: Finite
    peak_mb: Finite | None
    gain: Interval | None = None


def grid(
    targets: Sequence[str], ranks: Sequence[int], seeds: Sequence[int], base: bool, full: bool
) -> list[Cell]:
    """Every cell, in the order of the table."""
    cells = [Cell("base")] if base else []
    cells += [Cell("full", seed=seed) for seed in seeds] if full else []
    return cells + [Cell("lora", t, r, seed) for t in targets for r in ranks for seed in seeds]


def read_cell(folder: Path, settings: Mapping[str, Any]) -> CellResult | None:
    """A cell that has been finished; None if it has not.

    Raises:
        CheckpointError: it is of a sweep with other settings, or its record is damaged.
    """
    record = read_finished(folder, CellRecord, settings, "a new `name`")
    return None if record is None else record.result


def rows_of(results: Sequence[CellResult]) -> list[Row]:
    """The table: cells of equal row gathered, in the order they first appear."""
    gathered: dict[tuple[Kind, str, int], list[CellResult]] = {}
    for result in results:
        gathered.setdefault(result.cell.row, []).append(result)
    return [_row(*key, cells) for key, cells in gathered.items()]


def _row(kind: Kind, targets: str, r: int, cells: Sequence[CellResult]) -> Row:
    names = [name for name in cells[0].metrics if all(name in cell.metrics for cell in cells)]
    values = {name: [cell.metrics[name] for cell in cells] for name in names}
    peaks = [cell.peak_mb for cell in cells if cell.peak_mb is not None]
    return Row(
        kind=kind,
        targets=targets,
        r=r,
        seeds=len(cells),
        mean={name: statistics.fmean(numbers) for name, numbers in values.items()},
        deviation={name: statistics.stdev(n) if len(n) > 1 else 0.0 for name, n in values.items()},
        trained=cells[0].trained,
        bytes=statistics.fmean(cell.bytes for cell in cells),
        seconds=statistics.fmean(cell.seconds for cell in cells),
        peak_mb=max(peaks) if peaks else None,
        gain=_widest([cell.gain for cell in cells if cell.gain is not None]),
    )


def _widest(gains: Sequence[Interval]) -> Interval | None:
    """The mean gain of the seeds, and from the lowest to the highest end of their intervals."""
    if not gains:
        return None
    mean = statistics.fmean(gain.value for gain in gains)
    return Interval(mean, min(gain.low for gain in gains), max(gain.high for gain in gains), gains[0].level)


def table(rows: Sequence[Row], metrics: Sequence[str]) -> Table:
    """Show of each row its name, rank, costs, metrics in percent (mean ± deviation of the seeds) and gain."""
    gains = any(row.gain is not None for row in rows)
    return Table(
        title="",
        columns=(
            "model",
            "r",
            "trained",
            "MB",
            "seconds",
            "peak MB",
            *metrics,
            *(("gain",) if gains else ()),
        ),
        rows=tuple((*_named(row, metrics), *((_gain(row),) if gains else ())) for row in rows),
        note=_GAIN if gains else "",
        keys=2,
    )


def _named(row: Row, metrics: Sequence[str]) -> tuple[str, ...]:
    trains = row.kind != "base"
    return (
        {"base": "base", "full": "full fine-tuning", "lora": row.targets}[row.kind],
        str(row.r) if row.kind == "lora" else "",
        f"{row.trained:,}",
        f"{row.bytes / 1e6:.2f}" if trains else "",
        f"{row.seconds:.0f}" if trains else "",
        f"{row.peak_mb:,.0f}" if row.peak_mb is not None else "",
        *(_percent(row, metric) for metric in metrics),
    )


def _percent(row: Row, metric: str) -> str:
    return with_deviation(100 * row.mean[metric], 100 * row.deviation[metric] if row.seeds > 1 else None)


def _gain(row: Row) -> str:
    gain = row.gain
    return "" if gain is None else with_interval(100 * gain.value, 100 * gain.low, 100 * gain.high)
