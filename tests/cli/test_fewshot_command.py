"""`clipgraft fewshot`, from the command line to table, JSON and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipgraft.cli.fewshot import _tell_worse
from clipgraft.train.fewshot.args import FewShotArgs
from clipgraft.train.fewshot.results import FewShotCell, FewShotCellResult, FewShotComparison

COLOURS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (255, 0, 0)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three class folders of three pictures."""
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            picture = Image.new("RGB", (20, 20), tuple(min(255, value + index) for value in colour))
            picture.save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_a_class_folder_becomes_a_table(cli: Any, base: list[str], images: Path, tmp_path: Path) -> None:
    """The command trains nothing, or its table, JSON or figure is missing."""
    out = tmp_path / "out"
    flags = ["--train-data", images, "--test-size", "0.3", "--shots", "1,2", "--seeds", "2", "--views", "1"]
    modes = ["--modes", "tip-adapter,prolip", "--workers", "0", "--out", out]
    done = cli("fewshot", *base, *flags, *modes)
    assert done.code == 0, done.err
    assert "tip-adapter" in done.out
    assert {row["mode"] for row in json.loads((out / "shots-1.json").read_text())["rows"]} == {
        "zero-shot",
        "tip-adapter",
        "prolip",
    }
    assert (out / "table.md").read_text().startswith("| mode | 1 shot | 2 shots |")
    assert 'xmlns="http://www.w3.org/2000/svg"' in (out / "accuracy.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "--train-data is missing"),
        (["--train-data", "{images}"], "give --test-data, or --test-size"),
        (["--dataset", "eurosatt"], "--dataset eurosatt: there is no such set; did you mean eurosat?"),
        (["--dataset", "eurosat", "--root", "{images}"], "where CoOp's DATASETS.md puts eurosat"),
        (["--dataset", "eurosat", "--test-size", "0.5"], "--test-size given beside --dataset"),
        (["--train-data", "{images}", "--test-size", "0.5", "--templates", "coop"], "--templates coop"),
        (["--train-data", "{images}", "--test-size", "0.5", "--modes", "tip"], "--modes"),
        (
            ["--train-data", "{images}", "--test-size", "0.5", "--shots", "1,1"],
            "allowed is each of them once",
        ),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], fault: str, cli: Any, base: list[str], images: Path, tmp_path: Path
) -> None:
    """A slip of the keyboard ends in a traceback, or after the model was loaded and trained."""
    given = [flag.format(images=images) for flag in flags]
    done = cli("fewshot", *base, *given, "--out", tmp_path / "out")
    assert done.code == 2
    assert fault in done.err


def test_a_mode_below_zero_shot_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A newcomer takes an adapter home that knows less than the base, and is not told what to change."""
    cells = [FewShotCellResult(FewShotCell("zero-shot"), {"accuracy": 0.5})]
    cells += [FewShotCellResult(FewShotCell("clip-lora", shots, 1), {"accuracy": 0.4}) for shots in (1, 2)]
    cells += [FewShotCellResult(FewShotCell("tip-adapter", 1, 1), {"accuracy": 0.4})]
    cells += [FewShotCellResult(FewShotCell("prolip", 1, 1), {"accuracy": 0.5})]
    _tell_worse(FewShotComparison("all", tuple(cells)), FewShotArgs())
    assert caplog.messages == [
        "clip-lora is below zero-shot at --shots 1,2: 500 steps a shot are too many for this base; try "
        "--steps-per-shot 50 and another --out",
        "tip-adapter is below zero-shot at --shots 1",
    ]
