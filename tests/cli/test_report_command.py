"""`clipgraft report`: one command from runs to a page, and one clear line for what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from html_pages import read_page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
LORA = ("--use-lora", "--lora-r", "2", "--save-lora-only")


@pytest.fixture
def run(train: Any, table: Path, tmp_path: Path) -> Path:
    """A run of one epoch."""
    outcome = train(*LORA, "--name", "r", "--val-data", table, "--feature-cache", "none")
    assert (outcome.code, outcome.err) == (0, "")
    return tmp_path / "logs" / "r"


def test_a_page_from_one_command(cli: Any, run: Path, table: Path, tmp_path: Path) -> None:
    """A newcomer's first report fails, or is written elsewhere than they said."""
    out = tmp_path / "trang" / "báo cáo.html"
    outcome = cli("report", run, "--out", out, "--retained", table, "--csv-img-key", "image", "--workers", 0)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"wrote {out} (" in outcome.out
    assert f"choosing examples of {run}, once" in outcome.out
    page = read_page(out)
    assert page.all("table", class_="forgotten")
    again = cli("report", run, run, "--out", out, "--no-examples")
    assert (again.code, again.err) == (0, "")
    assert "examples of" not in again.out


def test_folders_and_flags_in_any_order(cli: Any, run: Path, train: Any, tmp_path: Path) -> None:
    """Runs that are named after a flag are left out."""
    assert train(*LORA, "--name", "a, b", "--feature-cache", "none").code == 0
    out = tmp_path / "report.html"
    outcome = cli("report", run, "--no-examples", tmp_path / "logs" / "a, b", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert read_page(out).all("h1")[0].text == "r, a, b"
    config = tmp_path / "report.yaml"
    config.write_text(f"runs: ['{run}']\nexamples: false\nout: '{tmp_path / 'other.html'}'\n")
    assert cli("report", "--config", config).code == 0
    assert (tmp_path / "other.html").is_file()


def test_the_record_of_a_run_is_json(run: Path, table: Path) -> None:
    """What a run was given can be read by no other program."""
    params = json.loads((run / "params.json").read_text(encoding="utf-8"))
    assert params["val_data"] == str(table)
    assert (params["lora_r"], params["use_lora"], params["epochs"], params["task"]) == (
        2,
        True,
        1,
        "retrieval",
    )
    assert params["lora"]["targets"] == "text-matrices"


def test_what_is_refused(cli: Any, run: Path, tmp_path: Path) -> None:
    """A wrong command ends in a traceback, or in a page about something else."""
    for words, message in (
        ([], "RUNS is missing: folders of runs and sweeps"),
        ([tmp_path / "logs"], "is no run, it holds 1: name those to report on"),
        ([tmp_path / "nothing"], "there is no such folder; give the folder of a run"),
        ([run, "--retained", tmp_path / "no.csv"], "--retained"),
        ([run, "--csv-img-key", "image"], "--csv-img-key belong to --retained: name those data too"),
        ([run, "--out", tmp_path], "is a folder: name a file in it"),
        ([run, "--retaned", "x"], "did you mean --retained"),
    ):
        outcome = cli("report", *words)
        assert outcome.code == 2, words
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == 1
    (run / "results.json").write_text("{")
    outcome = cli("report", run)
    assert outcome.code == 2
    assert "results.json: is not JSON" in outcome.err
