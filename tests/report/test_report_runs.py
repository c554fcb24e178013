"""Reading what runs left: all of it, what is there of unfinished ones, and one clear line for damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clipgraft.errors import ClipgraftError
from clipgraft.report.runs import Run, Sweep, read_run, read_sources, read_sweep, run_of
from clipgraft.report.write_report import write_report
from html_pages import read_page


def test_a_run_as_its_files_say(world: Any) -> None:
    """The report forgets settings, or shows curves of other steps."""
    (run,) = read_sources([world.run])
    assert isinstance(run, Run)
    results = json.loads((world.run / "results.json").read_text())
    events = [json.loads(line) for line in (world.run / "events.jsonl").read_text().splitlines()]
    assert run.losses == tuple((e["step"], e["loss"]) for e in events if e["kind"] == "train")
    assert [e["epoch"] for e in run.evaluations] == [1, 2]
    assert run.base == results["base"]
    assert run.best_epoch == results["best_epoch"]
    assert (run.trained, run.bytes) == (results["trainable"], results["bytes"])
    assert (run.kind, run.task, run.finished) == ("lora", "retrieval", True)
    assert run.saved == world.run / "adapter"
    assert run.params["train_data"] == run.params["val_data"] == str(world.table)
    assert run.params["lora"]["r"] == 2
    assert run.started is not None
    assert run.ended is not None
    assert run.started <= run.ended


def test_a_run_that_is_still_running(copied: Path, tmp_path: Path) -> None:
    """A look at a run under way ends in an error, or shows it as if it were done."""
    (copied / "results.json").unlink()
    shutil.rmtree(copied / "adapter")
    lines = (copied / "events.jsonl").read_text().splitlines(keepends=True)
    (copied / "events.jsonl").write_text("".join(lines[:5]) + lines[5][:10])
    run = read_run(copied)
    assert (run.finished, len(run.losses) + len(run.evaluations)) == (False, 4)
    page = read_page(write_report([copied], tmp_path / "report.html"))
    assert "unfinished: step 3, epoch 1 of 2" in page.text
    assert "no examples." in page.text
    assert "has saved nothing yet" in page.text


def test_a_run_of_an_older_version(copied: Path) -> None:
    """Runs from before params.json lose their settings."""
    new = read_run(copied)
    (copied / "params.json").unlink()
    old = read_run(copied)
    for name in ("model", "lr", "epochs", "use_lora", "val_data", "autocast", "csv_img_key"):
        assert old.params[name] == new.params[name]


def test_the_table_of_a_sweep_from_its_cells(world: Any, tmp_path: Path) -> None:
    """A sweep that was stopped before its table shows nothing, or other numbers than its table."""
    whole = read_sweep(world.sweep)
    copy = Path(shutil.copytree(world.sweep, tmp_path / "sweep"))
    (copy / "table.json").unlink()
    (copy / "cells" / "vision.1._-r2-seed1" / "cell.json").unlink()
    cut = read_sweep(copy)
    assert cut.unfinished == ("vision.1._-r2-seed1",)
    assert [row for row in cut.rows if row.r != 2] == [row for row in whole.rows if row.r != 2]
    assert {row.seeds for row in cut.rows if (row.targets, row.r) == ("vision.1.*", 2)} == {1}
    shutil.rmtree(copy / "cells")
    shutil.copy(world.sweep / "table.json", copy)
    assert read_sweep(copy).rows == whole.rows
    record = json.loads((world.sweep / "table.json").read_text())["rows"]
    assert [(row.kind, row.targets, row.r) for row in whole.rows] == [
        (row["kind"], row["targets"], row["r"]) for row in record
    ]


def test_the_best_adapter_of_a_sweep(world: Any) -> None:
    """The gallery shows a poor adapter, full fine-tuning, or none."""
    sweep = read_sweep(world.sweep)
    assert isinstance(sweep, Sweep)
    totals = {
        (row.targets, row.r): row.mean["image_to_text_R@1"] + row.mean["text_to_image_R@1"]
        for row in sweep.rows
        if row.kind == "lora"
    }
    run = run_of(sweep)
    assert run is not None
    lora = run.params["lora"]
    assert totals[lora["targets"], lora["r"]] == max(totals.values())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", "{", "results.json: is not JSON (Expecting property name"),
        (
            "results.json",
            "[]",
            "results.json: the whole is a list, and should be an object",
        ),
        ("results.json", '{"bytes": 3}', "results.json: saved is missing (and 2 more); restore it"),
        ("params.json", "{'a'", "params.json: is not JSON"),
        ("events.jsonl", '{"kind": "train", "step": 1, "loss": 1}\nx\n', "events.jsonl, line 2: is not JSON"),
    ],
)
def test_damage_is_one_line(file: str, text: str, message: str, copied: Path, tmp_path: Path) -> None:
    """A file that a full disk cut short ends in a traceback, or in a report of half the numbers."""
    (copied / file).write_text(text)
    with pytest.raises(ClipgraftError) as caught:
        write_report([copied], tmp_path / "report.html")
    assert message in str(caught.value)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run(world: Any, tmp_path: Path) -> None:
    """Somebody who names the folder above, or mistypes, is left to guess."""
    for path, message in (
        (world.logs, "is no run, it holds 5: name those to report on, like"),
        (tmp_path / "nothing", "there is no such folder"),
        (world.table, "is a file"),
        (tmp_path, "is no run: it has neither events.jsonl nor cells/"),
    ):
        with pytest.raises(ClipgraftError, match="run") as caught:
            write_report([path], tmp_path / "report.html")
        assert message in str(caught.value)


def test_twice_named_is_read_once(world: Any) -> None:
    """`clipgraft report logs/r logs/*` shows a run twice."""
    assert len(read_sources([world.run, world.run / ".." / "run", world.sweep])) == 2
