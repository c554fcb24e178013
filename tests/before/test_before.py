"""What was made before the house was rebuilt is read, gone on with and answered as before."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.cli import main

FILES = Path(__file__).parent / "files"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))
CAPTIONS = ["a red card", "a blue card"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write in, as the current folder."""
    folder = shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("place", ["run/adapter", "run", "run/checkpoints/epoch_1", "guide.pt"])
def test_adapters_give_the_same_features(files: Path, place: str) -> None:
    """Everybody's adapters of last month give other vectors, or none."""
    if place.endswith(".pt"):
        clip = cg.load("emoji")
        cg.load_adapter(clip, files / place)
    else:
        clip = cg.load(files / place)
    found = clip.encode_text(CAPTIONS)[:, :8]
    torch.testing.assert_close(found, torch.tensor(EXPECTED["features"]), atol=2e-4, rtol=1e-3)


def test_a_run_goes_on(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of last month cannot be resumed, and its training was for nothing."""
    command = ["train", "--train-data", "pairs.tsv", "--val-data", "pairs.tsv", "--use-lora", "--lora-r", "2"]
    command += ["--lora-targets", "text.*.q,v", "--batch-size", "4", "--lr", "1e-3", "--workers", "0"]
    command += ["--feature-cache", "none", "--precision", "fp32", "--device", "cpu", "--logs", "."]
    command += ["--wd", "0.2", "--warmup", "10000"]  # the defaults of then
    assert main([*command, "--name", "run", "--resume", "latest", "--epochs", "2"]) == 0, capsys.readouterr()
    record = json.loads((files / "run" / "results.json").read_text(encoding="utf-8"))
    assert {line["epoch"] for line in record["history"]} >= {1, 2}


def test_encoded_folders_answer(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that was encoded last month must be encoded again."""
    assert main(["search", "encoded", "a red card"]) == 0, capsys.readouterr()
    assert ".png" in capsys.readouterr().out


def test_a_report_of_a_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of last month have no report."""
    assert main(["report", "run", "--out", "report.html"]) == 0, capsys.readouterr()
    assert (files / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("verb", sorted(EXPECTED["flags"]))
def test_no_flag_is_lost(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that somebody keeps in a script ends with `there is no such flag`."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    found = set(re.findall(r"^  (--[a-z0-9][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE))
    assert set(EXPECTED["flags"][verb]) - found == set()
