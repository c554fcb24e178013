"""`clipgraft sweep`."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.common import base_below
from clipgraft.cli.flags.groups import recorded
from clipgraft.cli.flags.shared import DataFlags, ModelFlags, features_of
from clipgraft.cli.flags.training import ClassTrainFlags, SweepFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.locks import LOCK, require_free, sole_owner
from clipgraft.options import Options
from clipgraft.train.args import TrainArgs

if TYPE_CHECKING:
    from clipgraft.cli.sweep_cell import Job
    from clipgraft.models.clip import Clip
    from clipgraft.train.sweep import CellResult, Row

log = logging.getLogger("clipgraft")
_SUMMARY = "Train every combination of target set, rank and seed, and compare them in one table."


def run_sweep(argv: Sequence[str]) -> None:
    """Parse, run the cells that are not finished, and write the table."""
    kinds: list[type[Options]] = [ModelFlags, DataFlags, ClassTrainFlags, SweepFlags, TrainArgs]
    specs = parse("sweep", _SUMMARY, kinds, argv)
    model_spec, data, classes, sweep, train = specs
    _check(model_spec, data, classes, sweep, train)
    log.info(
        "%d target set%s: %s", len(sweep.targets), "s" * (len(sweep.targets) > 1), " | ".join(sweep.targets)
    )
    folder = sweep.logs / sweep.name
    busy = (folder / LOCK, f"sweep {folder}", "wait until it ends, or choose another --name")
    require_free(*busy)
    from clipgraft.cli.common import load_model
    from clipgraft.cli.sweep_cell import Job
    from clipgraft.cli.training_data import read_training_data
    from clipgraft.evaluate.metrics import DECISIVE, HEADLINE
    from clipgraft.lora.targets import select_sites
    from clipgraft.models.device import use_autocast

    clip = load_model(model_spec)
    towers = frozenset(site.tower for term in sweep.targets for site in select_sites(clip.sites, term))
    features = features_of(data, use_autocast(model_spec.autocast, clip.device))
    read = read_training_data(clip, data, classes, train.seed, sweep.test_data)
    settings = _settings(specs, clip)
    del clip  # every cell loads its own
    tested = () if read.test is None else tuple(f"test_{name}" for name in DECISIVE[read.task])
    with sole_owner(*busy):
        results = _run_cells(folder, Job(model_spec, sweep, train, read, features, towers), settings)
        _write(folder, results, HEADLINE[read.task] + tested)


def _run_cells(folder: Path, job: Job, settings: dict[str, Any]) -> list[CellResult]:
    """Read the results of finished cells, and run the others."""
    from clipgraft.cli.sweep_cell import run_apart
    from clipgraft.train.cells import write_finished
    from clipgraft.train.sweep import grid, read_cell

    sweep, train = job.sweep, job.train
    cells = grid(
        sweep.targets, sweep.lora_r, range(train.seed, train.seed + sweep.seeds), sweep.base, sweep.full
    )
    results: list[CellResult] = []
    for number, cell in enumerate(cells, start=1):
        place = folder / "cells" / cell.name
        result = read_cell(place, settings)
        if result is None:
            log.info("cell %d of %d: %s", number, len(cells), cell.name)
            result = run_apart(job, cell, place)
            write_finished(place, result, settings)
        else:
            log.info("cell %d of %d: %s is finished already", number, len(cells), cell.name)
        results.append(result)
    return results


def _check(
    model: ModelFlags, data: DataFlags, classes: ClassTrainFlags, sweep: SweepFlags, train: TrainArgs
) -> None:
    """Raise ConfigError with all faults that no option alone shows, before anything slow."""
    from clipgraft.lora.targets import select_sites

    faults = checks.class_faults(classes, data)
    if data.train_data is None:
        faults.append("--train-data is missing: a table of images and captions, or a folder of both")
    if data.val_data is None and not (classes.task == "classification" and classes.val_size):
        faults.append("--val-data is missing: the table measures every cell on it")
    given = {"--train-data": data.train_data, "--val-data": data.val_data, "--test-data": sweep.test_data}
    for name, path in given.items():
        if path is not None:
            faults += checks.missing_data(name, path)
    if sweep.test_data is not None and classes.head != "prompts":
        faults.append(
            f"--test-data is measured by prompts, not by --head {classes.head}: drop it, and measure a "
            "cell's head/ with `clipgraft eval --classifier`"
        )
    if len(set(sweep.targets)) < len(sweep.targets) or len(set(sweep.lora_r)) < len(sweep.lora_r):
        faults.append("--targets and --lora-r must not name the same thing twice")
    faults += train.epoch_faults() + checks.output_faults("--logs", sweep.logs / sweep.name, folder=True)
    read_as = {"--val-data": (data.for_validation(), classes.for_validation())}
    for name, path in given.items():
        faults += checks.table_faults(name, path, *read_as.get(name, (data, classes)))
    if classes.task == "retrieval":
        faults += checks.batch_faults(data.train_data, data, train)
    faults += checks.prompt_faults(classes) + checks.device_faults(model.device)
    clip, wrong = checks.structure_of(model)
    faults += wrong + _start_faults(model) + checks.loss_faults(clip, classes, train)
    if clip is not None:
        for targets in sweep.targets:
            faults += checks.fault_of(partial(select_sites, clip.sites, targets), "--targets")
    checks.refuse(faults)


def _start_faults(model: ModelFlags) -> list[str]:
    """Refuse an adapter, or a run that made one, as the model: cells start from a base."""
    base = base_below(model)
    if base is None:
        return []
    named = f"--model {base.name}" + (f" --pretrained {base.pretrained}" if base.pretrained else "")
    return [
        f"--model {model.model} is an adapter on its base, and every cell of a sweep starts from a base "
        f"without one: give {named}"
    ]


def _settings(specs: Sequence[Any], clip: Clip) -> dict[str, Any]:
    """Collect the settings that all cells of a table must share; more cells may be added later."""
    grown = {"targets", "lora_r", "seeds", "seed", "base", "full", "logs", "name", "workers", "cache_gb"}
    dumped = {name: value for spec in specs for name, value in spec.model_dump(mode="json").items()}
    shared = recorded([type(spec) for spec in specs], specs).keys() - grown
    return {"fingerprint": clip.fingerprint, **{n: v for n, v in dumped.items() if n in shared}}


def _write(folder: Path, results: Sequence[CellResult], metrics: tuple[str, ...]) -> None:
    """Print the table, and write it as text, CSV and JSON."""
    from clipgraft.files import write_json, write_text
    from clipgraft.train.sweep import rows_of, table

    rows = rows_of(results)
    found = table(rows, metrics)
    print()
    show(found)
    print()
    write_text(folder / "table.md", f"{found.markdown()}\n")
    write_json(folder / "table.json", {"metrics": list(metrics), "rows": [asdict(row) for row in rows]})
    _write_csv(folder / "table.csv", rows, metrics)
    log.info("wrote %s, table.csv and table.json", folder / "table.md")


def _write_csv(path: Path, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    from clipgraft.files import atomic_path

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        fixed = ("kind", "targets", "r", "seeds", "trained", "bytes", "seconds", "peak_mb")
        gain = ("gain", "gain low", "gain high")
        writer.writerow([*fixed, *(f"{m}{part}" for m in metrics for part in ("", " deviation")), *gain])
        for row in rows:
            values: Mapping[str, Any] = asdict(row)
            numbers = [v for m in metrics for v in (row.mean[m], row.deviation[m])]
            ends = ("", "", "") if row.gain is None else (row.gain.value, row.gain.low, row.gain.high)
            writer.writerow([*(values[name] for name in fixed), *numbers, *ends])
