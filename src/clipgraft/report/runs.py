"""Read runs and sweeps from their folders as plain values, without loading a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from clipgraft.adapters.run_folder import RunModel, find_run_model, is_run, read_params, read_record
from clipgraft.errors import CheckpointError, DataError
from clipgraft.evaluate.metrics import DECISIVE, TaskName, task_of
from clipgraft.records import Finite, Whole
from clipgraft.train.cells import CELL_FILE
from clipgraft.train.rate import Rate
from clipgraft.train.run_folder import EVENTS, read_events
from clipgraft.train.strength import StrengthCurve
from clipgraft.train.sweep import Cell, CellRecord, CellResult, Row, read_cell, rows_of
from clipgraft.train.verdict import Verdict

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ \| ", re.M)
_KINDS = ("base", "full", "lora")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: its folder.
        name: that people call it.
        params: what it was given; empty where it left no record of that.
        losses: (step, loss) of its steps.
        base: metrics before the first step; None where they were not measured.
        evaluations: metrics of evaluated epochs, with `epoch` and `step`.
        best_epoch: the one that was saved; None where that is the last one, or nothing was saved.
        verdict: whether it is better than what the run began with; None where that is not known.
        model: what the run saved at its end, and what it began with; None where it has not come to its end.
        trained: number of trained weights; None for a run that has not finished, as are the next two.
        bytes: size of what was saved.
        seconds: of the run, evaluation included.
        started, ended: first and last line of its log.
        rows: how many pairs or images it trained on; None where that is not recorded.
        made_with: machine and versions, by name.
        strength: what is gained and kept by the strength of what was learnt; None where that is not known.
    """

    path: Path
    name: str
    params: Mapping[str, Any]
    losses: tuple[tuple[int, float], ...]
    base: dict[str, float] | None
    evaluations: tuple[Mapping[str, float], ...]
    best_epoch: int | None
    verdict: Verdict | None
    model: RunModel | None
    trained: int | None
    bytes: int | None
    seconds: float | None
    started: datetime | None
    ended: datetime | None
    rows: int | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    strength: StrengthCurve | None = None

    @property
    def saved(self) -> Path | None:
        """The adapter folder or the fine-tuned model."""
        return None if self.model is None else self.model.saved

    @property
    def finished(self) -> bool:
        return self.trained is not None

    @property
    def task(self) -> TaskName:
        if self.evaluations:
            return task_of(self.evaluations[-1])
        return "classification" if self.params.get("task") == "classification" else "retrieval"

    @property
    def measured(self) -> tuple[Mapping[str, float], ...]:
        """All evaluations, including that of epoch 0 before the first step."""
        before = () if self.base is None else ({"epoch": 0.0, "step": 0.0, **self.base},)
        return (*before, *self.evaluations)

    @property
    def kind(self) -> Literal["lora", "full"]:
        lora = (self.path / "adapter").is_dir() or self.params.get("use_lora") or self.params.get("lora")
        return "lora" if lora else "full"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of what was saved, or of the last epoch so far."""
        if self.strength is not None and self.strength.applied:
            return _metrics(self.strength.metrics)
        best = [line for line in self.evaluations if line.get("epoch") == self.best_epoch]
        kept = best or self.evaluations[-1:]
        return _metrics(kept[-1]) if kept else {}


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Attributes:
        path: its folder.
        name: that people call it.
        task: what all its cells are trained for.
        settings: what they share.
        rows: the table, in its order.
        cells: each finished cell with its result.
        runs: the runs of cells that trained, finished or not, by the name of the cell.
        unfinished: names of cells that have been started and not finished.
    """

    path: Path
    name: str
    task: TaskName
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    cells: tuple[CellResult, ...]
    runs: Mapping[str, Run]
    unfinished: tuple[str, ...]


def read_sources(paths: Sequence[Path]) -> list[Run | Sweep]:
    """Read the runs and sweeps in some folders, in order; a folder that is named twice is read once.

    Raises:
        DataError: a path is neither.
        CheckpointError: a file in it is damaged.
    """
    found: dict[Path, Run | Sweep] = {}
    for path in paths:
        place = path.resolve()
        if place not in found:
            found[place] = read_sweep(path) if is_sweep(path) else read_run(_checked(path))
    return list(found.values())


def is_sweep(path: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (path / "cells").is_dir() or (path / "table.json").is_file()


def _checked(path: Path) -> Path:
    if is_run(path):
        return path
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise DataError(f"{path}: {what}; give the folder of a run or of a sweep, like logs/NAME")
    inside = sorted(str(child) for child in path.iterdir() if is_sweep(child) or is_run(child))
    if inside:
        shown = " ".join(inside[:4]) + (" …" if len(inside) > 4 else "")
        raise DataError(f"{path} is no run, it holds {len(inside)}: name those to report on, like {shown}")
    raise DataError(
        f"{path} is no run: it has neither {EVENTS} nor cells/; name that of a run, sweep or `fewshot`"
    )


@dataclass(frozen=True)
class _Results:
    """The fields of `results.json` that the report shows."""

    saved: str
    trainable: Whole
    bytes: Whole
    seconds: Finite
    best_epoch: Whole | None = None
    rows: Whole | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    rate: Rate | None = None
    strength: StrengthCurve | None = None


@dataclass(frozen=True)
class _Table:
    """The fields of a sweep's `table.json` that the report uses."""

    metrics: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def read_run(path: Path, name: str = "", params: Mapping[str, Any] | None = None) -> Run:
    """Read the files of one run; `params` are added to those that it recorded itself.

    Raises:
        CheckpointError: one of them is damaged.
    """
    events = read_events(path / EVENTS)
    results = read_record(path / "results.json", _Results)
    started, ended = _dates(path / "out.log")
    measured = [_numbers(event) for event in events if event["kind"] == "val"]
    return Run(
        path=path,
        name=name or path.resolve().name,
        params={**read_params(path), **(params or {}), **_found_rate(results)},
        losses=tuple((int(e["step"]), float(e["loss"])) for e in events if e["kind"] == "train"),
        base=next((_metrics(line) for line in measured if line["step"] == 0), None),
        evaluations=tuple(line for line in measured if line["step"] > 0),
        best_epoch=results.best_epoch if results else None,
        verdict=results.verdict if results else None,
        model=_finished_model(path),
        trained=results.trainable if results else None,
        bytes=results.bytes if results else None,
        seconds=results.seconds if results else None,
        started=started,
        ended=ended,
        rows=results.rows if results else None,
        made_with=results.made_with if results else {},
        strength=results.strength if results else None,
    )


def _found_rate(results: _Results | None) -> dict[str, Any]:
    """The learning rate of a run whose `lr` was `auto`, in place of that word."""
    return {} if results is None or results.rate is None else {"lr": results.rate.lr}


def read_sweep(path: Path) -> Sweep:
    """Read the cells of a sweep, and the table of those that are finished.

    Raises:
        CheckpointError: a file is damaged.
    """
    table = read_record(path / "table.json", _Table) or _Table()
    folders = sorted(folder for folder in path.glob("cells/*/") if folder.is_dir())
    records = [read_record(folder / CELL_FILE, CellRecord) for folder in folders]
    settings = next((dict(record.settings) for record in records if record is not None), {})
    results = {folder: read_cell(folder, {}) for folder in folders}
    cells = _ordered([result for result in results.values() if result is not None], table)
    # The seed that all seeds count from also chose what is held out.
    settings["seed"] = min((done.cell.seed for done in cells if done.cell.kind != "base"), default=0)
    runs = {}
    for folder in folders:
        if is_run(folder / "run"):
            result = results[folder]
            own = {} if result is None else {**settings, **_cell_params(result.cell)}
            runs[folder.name] = read_run(folder / "run", folder.name, own)
    measured = cells[0].metrics if cells else dict.fromkeys(table.metrics, 0.0)
    task = task_of(measured)
    rows = tuple(rows_of(cells)) if cells else table.rows
    unfinished = tuple(folder.name for folder, result in results.items() if result is None)
    return Sweep(path, path.resolve().name, task, settings, rows, tuple(cells), runs, unfinished)


def run_of(source: Run | Sweep) -> Run | None:
    """Choose the run whose examples are shown: the run itself, or the best adapter of a sweep."""
    return _best_run(source) if isinstance(source, Sweep) else source


def _best_run(sweep: Sweep) -> Run | None:
    head = DECISIVE[sweep.task]
    scored = [
        (sum(row.mean.get(name, 0.0) for name in head), row) for row in sweep.rows if row.kind == "lora"
    ]
    if not scored:
        return None
    best = max(scored, key=lambda pair: pair[0])[1]
    names = [cell.cell.name for cell in sweep.cells if cell.cell.row == (best.kind, best.targets, best.r)]
    return next((sweep.runs[name] for name in names if name in sweep.runs), None)


def _cell_params(cell: Cell) -> dict[str, Any]:
    lora = {"use_lora": True, "lora_targets": cell.targets, "lora_r": cell.r} if cell.kind == "lora" else {}
    return {**lora, "cell_seed": cell.seed}


def _ordered(cells: list[CellResult], table: _Table) -> list[CellResult]:
    """Sort cells as the table has them; target sets that it lacks come last, by name."""
    places = {row.targets: place for place, row in reversed(list(enumerate(table.rows)))}

    def key(result: CellResult) -> tuple[Any, ...]:
        cell = result.cell
        place = places.get(cell.targets, len(places))
        return _KINDS.index(cell.kind), place, cell.targets, cell.r, cell.seed

    return sorted(cells, key=key)


def _finished_model(path: Path) -> RunModel | None:
    try:
        model = find_run_model(path)
    except CheckpointError:  # nothing is saved yet
        return None
    return None if model is None or model.unfinished is not None else model


def _metrics(line: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("epoch", "step")}


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in event.items() if name != "kind"}


def _dates(log: Path) -> tuple[datetime | None, datetime | None]:
    if not log.is_file():
        return None, None
    stamps = _STAMP.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not stamps:
        return None, None
    try:
        return datetime.fromisoformat(stamps[0]), datetime.fromisoformat(stamps[-1])
    except ValueError:  # the 31st of February, as after damage
        return None, None
