"""What a comparison of few-shot modes measured: its cells, the table of them, and its files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from clipgraft.errors import CheckpointError
from clipgraft.files import write_json, write_text
from clipgraft.records import Finite, Whole
from clipgraft.results import Result
from clipgraft.text_tables import Table, with_deviation
from clipgraft.train.cells import CELL_FILE, read_finished
from clipgraft.train.fewshot.args import MODES, Setting

CELLS = "cells"
ZERO_SHOT = "zero-shot"
METRICS: Mapping[Setting, tuple[str, ...]] = {
    "all": ("accuracy",),
    "base-to-novel": ("base", "novel", "harmonic mean"),
}
PUBLISHED: Mapping[Setting, tuple[tuple[str, str, int, float], ...]] = {
    "all": (("clip-lora", "accuracy", 16, 83.0),),
    "base-to-novel": (
        ("clip-lora", "harmonic mean", 16, 77.3),
        ("2sfs", "harmonic mean", 16, 80.2),
    ),
}
"""What the papers of CLIP-LoRA and 2SFS say of ViT-B/16: the mean of eleven sets, in percent."""
_THEIRS = "Theirs: what their papers say of CLIP ViT-B/16, the mean of eleven sets, not of this data."
_COSTS = "Trained weights and seconds: of each mode with its most shots."
_BLIND = ("tip-adapter", "tip-adapter-f", "linear-probe")
"""Modes that know nothing of classes without training images."""


@dataclass(frozen=True)
class FewShotCell:
    """One training of a mode: on so many images a class, drawn by a seed."""

    mode: str
    shots: Whole = 0
    seed: Whole = 0

    @property
    def name(self) -> str:
        """A folder's name, different for every cell of a comparison."""
        return self.mode if self.mode == ZERO_SHOT else f"{self.mode}-{self.shots}shots-seed{self.seed}"


@dataclass(frozen=True)
class FewShotCellResult:
    """What a finished cell left.

    Attributes:
        cell: which it is.
        metrics: `METRICS` of the setting, shares.
        images: number of training images.
        trained: number of trained weights.
        seconds: of the training; the images' encoding included, measuring not.
    """

    cell: FewShotCell
    metrics: dict[str, Finite]
    images: Whole = 0
    trained: Whole = 0
    seconds: Finite = 0.0


@dataclass(frozen=True)
class FewShotRecord:
    """What `cell.json` holds."""

    settings: dict[str, Any]
    result: FewShotCellResult


@dataclass(frozen=True)
class FewShotRow:
    """Cells that differ in their seed alone: means and, of metrics, sample deviations."""

    mode: str
    shots: int
    seeds: int
    mean: dict[str, float]
    deviation: dict[str, float]
    trained: int
    seconds: float


@dataclass(frozen=True, repr=False)
class FewShotComparison(Result):
    """Modes beside each other, by images a class.

    Attributes:
        setting: which classes were trained and tested on.
        cells: in the order in which they were run; the first is zero-shot.
    """

    _shows: ClassVar[tuple[str, ...]] = ("setting", "rows")

    setting: Setting
    cells: tuple[FewShotCellResult, ...]

    @property
    def rows(self) -> tuple[FewShotRow, ...]:
        """Cells of equal mode and shots gathered, in the order in which they first appear."""
        gathered: dict[tuple[str, int], list[FewShotCellResult]] = {}
        for result in self.cells:
            gathered.setdefault((result.cell.mode, result.cell.shots), []).append(result)
        return tuple(_row(*key, cells) for key, cells in gathered.items())

    @property
    def shots(self) -> tuple[int, ...]:
        """Images a class that were trained on, in order."""
        return tuple(sorted({result.cell.shots for result in self.cells if result.cell.mode != ZERO_SHOT}))

    @property
    def worse(self) -> tuple[FewShotRow, ...]:
        """Rows whose accuracy, or harmonic mean, is below that of zero-shot."""
        metric = METRICS[self.setting][-1]
        start = next(row for row in self.rows if row.mode == ZERO_SHOT).mean[metric]
        return tuple(row for row in self.rows if row.mean[metric] < start)

    def table(self) -> Table:
        """Show percent by mode and shots, costs at the most shots, and the papers' own numbers."""
        metrics, rows = METRICS[self.setting], self.rows
        several, seeds = len(metrics) > 1, max(row.seeds for row in rows)
        of_mode: dict[str, dict[int, FewShotRow]] = {}
        for row in rows:
            of_mode.setdefault(row.mode, {})[row.shots] = row
        lines = [
            self._line(mode, metric, by_shots, seeds)
            for mode, by_shots in of_mode.items()
            for metric in metrics
        ]
        theirs = [one for one in PUBLISHED[self.setting] if one[0] in of_mode and one[2] in self.shots]
        for mode, metric, shots, value in theirs:
            cells = [f"{value:.1f}" if shots == count else "" for count in self.shots]
            lines.append((f"{mode}, theirs", metric, *cells, "", ""))
        columns = (
            "mode",
            "",
            *(f"{n} shot{'s' * (n > 1)}" for n in self.shots),
            "trained weights",
            "seconds",
        )
        notes = [f"±: sample deviation over {seeds} seeds."] * (seeds > 1)
        notes += [_COSTS] * (len(self.shots) > 1) + [_THEIRS] * bool(theirs)
        if several and (blind := [mode for mode in _BLIND if mode in of_mode]):
            told = "knows nothing of novel classes, and answers"
            told = told if len(blind) == 1 else "know nothing of novel classes, and answer"
            notes.append(f"{', '.join(blind)}: {told} as zero-shot does.")
        kept = [place for place in range(len(columns)) if several or place != 1]
        return Table(
            title="",
            columns=tuple(columns[place] for place in kept),
            rows=tuple(tuple(line[place] for place in kept) for line in lines),
            note=" ".join(notes),
            left=(0, 1) if several else (0,),
            keys=2 if several else 1,
        )

    def _line(
        self, mode: str, metric: str, by_shots: Mapping[int, FewShotRow], seeds: int
    ) -> tuple[str, ...]:
        if mode == ZERO_SHOT:
            shown = f"{100 * by_shots[0].mean[metric]:.1f}"
            return (mode, metric, *[shown] * len(self.shots), "0", "")
        cells = [_percent(by_shots[n], metric, seeds) if n in by_shots else "" for n in self.shots]
        largest = by_shots[max(by_shots)]
        return (mode, metric, *cells, f"{largest.trained:,}", f"{largest.seconds:.2f}")

    def write(self, folder: Path) -> None:
        """Write `table.md`, `results.json` with every cell, and `shots-N.json` with the rows of N shots."""
        rows = self.rows
        write_text(folder / "table.md", f"{self.table().markdown()}\n")
        cells = [asdict(result) for result in self.cells]
        write_json(folder / "results.json", {"setting": self.setting, "cells": cells})
        for shots in self.shots:
            own = [asdict(row) for row in rows if row.shots == shots or row.mode == ZERO_SHOT]
            write_json(folder / f"shots-{shots}.json", {"setting": self.setting, "shots": shots, "rows": own})


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of a comparison which has come as far as its first cell."""
    return (folder / CELLS / ZERO_SHOT / CELL_FILE).is_file()


def read_comparison(folder: Path) -> FewShotComparison:
    """Read the finished cells of a comparison, whichever runs of it they are from.

    Raises:
        CheckpointError: there is none, or the record of a cell is damaged.
    """
    records = [
        record
        for place in sorted((folder / CELLS).glob("*/"))
        if (record := read_finished(place, FewShotRecord, {}, "")) is not None
    ]
    settings = {record.settings.get("setting") for record in records}
    setting = next((known for known in METRICS if settings == {known}), None)
    results = [record.result for record in records]
    modes = (ZERO_SHOT, *MODES)
    if setting is None or any(
        tuple(result.metrics) != METRICS[setting] or result.cell.mode not in modes for result in results
    ):
        raise CheckpointError(f"{folder / CELLS} holds what no comparison wrote: run it again elsewhere")

    def place_of(result: FewShotCellResult) -> tuple[int, int, int]:
        cell = result.cell
        return cell.shots, cell.seed, modes.index(cell.mode)

    return FewShotComparison(setting, tuple(sorted(results, key=place_of)))


def harmonic_mean(base: float, novel: float) -> float:
    """Return 2ab/(a + b), 0 where both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def _row(mode: str, shots: int, cells: Sequence[FewShotCellResult]) -> FewShotRow:
    values = {name: [cell.metrics[name] for cell in cells] for name in cells[0].metrics}
    return FewShotRow(
        mode=mode,
        shots=shots,
        seeds=len(cells),
        mean={name: statistics.fmean(numbers) for name, numbers in values.items()},
        deviation={name: statistics.stdev(n) if len(n) > 1 else 0.0 for name, n in values.items()},
        trained=cells[0].trained,
        seconds=statistics.fmean(cell.seconds for cell in cells),
    )


def _percent(row: FewShotRow, metric: str, seeds: int) -> str:
    shown = with_deviation(100 * row.mean[metric], 100 * row.deviation[metric] if row.seeds > 1 else None)
    return shown if row.seeds == seeds else f"{shown} ({row.seeds} seed{'s' * (row.seeds > 1)})"
