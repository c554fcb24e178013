"""`clipgraft sweep`: a grid of runs, its table, and going on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.cli import sweep_cell
from clipgraft.emoji.classes import write_classes
from clipgraft.models.load import load


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run cells in this process, one after another: a fresh interpreter takes seconds."""
    monkeypatch.setattr(sweep_cell, "run_apart", sweep_cell._run)


@pytest.fixture
def sweep(cli: Any, base: list[str], table: Path, tmp_path: Path, _here: None) -> Any:
    """`clipgraft sweep` on the tiny base and a dozen pictures."""

    def run(*words: object) -> Any:
        data = ["--train-data", table, "--val-data", table, "--workers", 0, "--logs", tmp_path / "logs"]
        training = ["--batch-size", 8, "--epochs", 1, "--lr", "1e-3"]
        return cli("sweep", *base, *data, *training, *words)

    return run


def test_the_grid_in_one_table(sweep: Any, tmp_path: Path) -> None:
    """A row is missing, a mean is of other cells, or the table says other sizes than the adapters have."""
    outcome = sweep("--targets", "text-attention;vision.1.*", "--lora-r", "1,2", "--seeds", 2)
    assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / "logs" / "sweep"
    rows = json.loads((folder / "table.json").read_text())["rows"]
    names = [(row["kind"], row["targets"], row["r"], row["seeds"]) for row in rows]
    assert names == [
        ("base", "", 0, 1),
        ("full", "", 0, 2),
        *(("lora", targets, r, 2) for targets in ("text-attention", "vision.1.*") for r in (1, 2)),
    ]
    cells = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/cell.json")}
    assert len(cells) == 1 + 2 + 8
    for name, cell in cells.items():
        handed = json.loads((folder / "cells" / name / "results" / "result.json").read_text())
        assert handed["test_result"] == [cell["result"]["metrics"]]
    for row in rows[2:]:
        stem = f"{row['targets'].replace('*', '_')}-r{row['r']}"
        own = [cells[f"{stem}-seed{seed}"]["result"] for seed in (0, 1)]
        for name in ("image_to_text_R@1", "text_to_image_R@5"):
            values = [result["metrics"][name] for result in own]
            assert row["mean"][name] == pytest.approx(sum(values) / 2)
            assert row["deviation"][name] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert row["trained"] == own[0]["trained"]
        runs = [folder / "cells" / f"{stem}-seed{seed}" / "run" / "results.json" for seed in (0, 1)]
        gains = [json.loads(run.read_text())["verdict"]["difference"] for run in runs]
        assert row["gain"]["value"] == pytest.approx(sum(gain["value"] for gain in gains) / 2)
        assert row["gain"]["low"] == min(gain["low"] for gain in gains)
        assert row["gain"]["high"] == max(gain["high"] for gain in gains)
    by_rank = {(row["targets"], row["r"]): row["trained"] for row in rows}
    assert by_rank["text-attention", 2] == 2 * by_rank["text-attention", 1]
    lines = outcome.out.splitlines()
    assert any(line.startswith("full fine-tuning") and "±" in line and " to " in line for line in lines)
    assert any(line.startswith("gain: ") and "95 % interval" in line for line in lines)
    assert (folder / "table.md").read_text().count("\n| ") == 1 + len(rows)
    assert (folder / "table.csv").read_text().count("\n") == 1 + len(rows)


def test_a_set_of_two_terms_is_one_cell(sweep: Any, tmp_path: Path) -> None:
    """`sweep` would compare two adapters where `train --lora-targets` with the same words makes one."""
    words = ("--targets", "text.0.q,vision.0.q", "--lora-r", 1, "--no-full", "--no-base")
    outcome = sweep(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 target set: text.0.q,vision.0.q\n" in outcome.out
    (cell,) = (tmp_path / "logs" / "sweep" / "cells").iterdir()
    record = json.loads((cell / "run" / "adapter" / "clipgraft.json").read_text())
    assert record["sites"] == ["text.0.q", "vision.0.q"]


def test_finished_cells_are_never_run_again(sweep: Any, tmp_path: Path) -> None:
    """A sweep that is started again repeats hours of work, or loses a cell that was under way."""
    grid = ["--targets", "text-attention", "--lora-r", "1", "--no-full"]
    assert sweep(*grid).code == 0
    cells = tmp_path / "logs" / "sweep" / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/cell.json")}
    outcome = sweep("--targets", "text-attention;vision.0.q", "--lora-r", "1", "--no-full")
    assert outcome.code == 0
    assert "cell 2 of 3: text-attention-r1-seed0 is finished already" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(cells.glob("*/cell.json"))) == 3
    (cells / "vision.0.q-r1-seed0" / "cell.json").unlink()  # as after a kill between run and record
    assert sweep("--targets", "text-attention;vision.0.q", "--lora-r", "1", "--no-full").code == 0
    outcome = sweep(*grid, "--lr", "1e-2")
    assert outcome.code == 2
    assert "was run with another lr: use the same settings, or a new --name" in outcome.err
    (cells / "base" / "cell.json").write_text("{")
    assert "cell.json: is not JSON" in sweep(*grid).err


def test_the_base_is_the_same_for_every_cell(sweep: Any, tmp_path: Path) -> None:
    """A cell starts from what another left behind, so that the order of a sweep changes its numbers."""
    assert (
        sweep("--targets", "text-attention;attention", "--lora-r", "2", "--no-full", "--name", "a").code == 0
    )
    assert sweep("--targets", "attention", "--lora-r", "2", "--no-base", "--no-full", "--name", "b").code == 0
    found = [
        json.loads((tmp_path / "logs" / name / "cells" / "attention-r2-seed0" / "cell.json").read_text())
        for name in ("a", "b")
    ]
    assert found[0]["result"]["metrics"] == found[1]["result"]["metrics"]


@pytest.mark.usefixtures("_here")
def test_classification(cli: Any, base: list[str], tmp_path: Path) -> None:
    """The table of target sets of a classifier cannot be made."""
    folder = write_classes(tmp_path / "classes", "train", 4)
    outcome = cli(
        *("sweep", *base, "--task", "classification", "--train-data", folder, "--val-size", "0.25"),
        *("--targets", "vision.1.*", "--lora-r", "2", "--no-full", "--batch-size", 25, "--epochs", 1),
        *("--workers", 0, "--logs", tmp_path / "logs", "--test-data", folder),
    )
    assert (outcome.code, outcome.err) == (0, "")
    header = next(line for line in outcome.out.splitlines() if line.startswith("model"))
    assert header.split()[-5:] == ["acc1", "acc5", "mean_per_class_recall", "test_acc1", "gain"]


def test_what_is_forgotten_is_a_column(
    sweep: Any, cli: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """The table says of other data what is true of the validation data, or of the base."""
    rows = table.read_text().splitlines()
    other = table.with_name("other.csv")
    other.write_text("\n".join(rows[:9]) + "\n")
    outcome = sweep(
        "--targets", "text-attention", "--lora-r", "4", "--no-full", "--lr", "0.05", "--test-data", other
    )
    assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / "logs" / "sweep"
    adapter = folder / "cells" / "text-attention-r4-seed0" / "run" / "adapter"
    metrics = tmp_path / "metrics.json"
    data = ["--val-data", other, "--workers", 0, "--adapter", adapter, "--out", metrics]
    assert cli("eval", *base, *data).code == 0
    measured = json.loads(metrics.read_text())
    for row, column in zip(
        json.loads((folder / "table.json").read_text())["rows"], ("base", "adapter"), strict=True
    ):
        for name in ("image_to_text_R@1", "text_to_image_mean_rank"):
            assert row["mean"][f"test_{name}"] == pytest.approx(measured[column][name])
    assert measured["base"] != measured["adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "nonsense"], "'nonsense' matches no site"),
        (["--lora-r", "4,0"], "--lora-r: got '0', allowed is greater than or equal to 1"),
        (["--lora-r", "4,4"], "must not name the same thing twice"),
        (["--seeds", "0"], "--seeds: got '0'"),
        (["--head", "linear"], "--head given without --task classification"),
        (["--test-data", "nowhere.csv"], "--test-data nowhere.csv: there is no such file or folder"),
        (
            ["--task", "classification", "--head", "linear", "--test-data", "."],
            "--test-data is measured by prompts, not by --head linear",
        ),
    ],
)
def test_bad_grids(sweep: Any, words: list[str], message: str, tmp_path: Path) -> None:
    """A typing error costs the cells before it, or ends in a traceback."""
    outcome = sweep(*words)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "logs").exists()


_KILLED = """
import os, signal, sys
import clipgraft.train.loop as loop
from clipgraft.cli import main
if sys.argv[1] == "cell":
    loop.save_checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    from clipgraft.cli import sweep_cell
    loop.save_checkpoint = lambda *_: (print("cell", os.getpid(), flush=True), signal.pause())
main(sys.argv[2:])
"""


def grid_of_one(base: list[str], table: Path, tmp_path: Path) -> list[str]:
    """A sweep of one cell."""
    words = ["--train-data", table, "--val-data", table, "--workers", 0, "--logs", tmp_path / "logs"]
    words += [
        "--targets",
        "text.0.q",
        "--lora-r",
        1,
        "--no-full",
        "--no-base",
        "--batch-size",
        8,
        "--epochs",
        1,
    ]
    return ["sweep", *base, *map(str, words)]


def start(how: str, words: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / f"{how}.py"
    script.write_text(_KILLED)
    return subprocess.Popen(
        [sys.executable, script, how, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_here")  # of the second sweep: the first is a process of its own
def test_a_cell_killed_before_its_first_checkpoint_is_started_over(
    cli: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """A sweep that the system killed for want of memory, or a power cut, could never go on."""
    words = grid_of_one(base, table, tmp_path)
    _, err = (killed := start("cell", words, tmp_path)).communicate()
    assert killed.returncode == 128 + signal.SIGKILL, "also from a script without the usual guard"
    assert "clipgraft: cell text.0.q-r1-seed0: its process was ended by SIGKILL" in err
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, "")
    log_of_run = tmp_path / "logs" / "sweep" / "cells" / "text.0.q-r1-seed0" / "run" / "out.log"
    assert "has no checkpoint yet: starting at the first step" in log_of_run.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_killed_sweep_takes_its_cell_along_and_lets_go_of_its_folder(
    cli: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """The cell would train on unseen, and the next sweep be refused; while it lives, a second must be."""
    words = grid_of_one(base, table, tmp_path)
    with start("sweep", words, tmp_path) as running:
        assert running.stdout is not None
        line = next(line for line in running.stdout if line.startswith("cell ") and " of " not in line)
        busy = cli(*words)
        assert busy.code == 2
        assert f"is in use by process {running.pid} on " in busy.err
        running.kill()
    assert running.stderr is not None
    with contextlib.suppress(ProcessLookupError):
        for _ in range(600):
            os.kill(int(line.split()[1]), 0)
            time.sleep(0.1)
        pytest.fail("the cell is still there")
    assert cli(*words).code == 0


def test_an_adapter_is_no_start(cli: Any, tiny_config: Path, table: Path, tmp_path: Path) -> None:
    """The fault is found by the first cell, after all data have been read."""
    clip = load(str(tiny_config), "none")
    cg.apply_lora(clip, r=2)
    adapter = cg.save_adapter(clip, tmp_path / "bộ chuyển")
    data = ("--train-data", table, "--val-data", table, "--batch-size", 8)
    outcome = cli("sweep", "--model", adapter, *data)
    assert outcome.code == 2
    assert "checking" not in outcome.out
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"clipgraft: --model {adapter} is an adapter on its base")
    assert line.endswith(f"give --model {tiny_config} --pretrained none")
