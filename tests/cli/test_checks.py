"""What needs no pixels is checked before images are opened, and all faults are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipgraft import pictures
from clipgraft.cli import checks
from clipgraft.cli.flags.shared import TableFlags
from clipgraft.errors import ConfigError
from clipgraft.train.args import TrainArgs


@pytest.fixture(autouse=True)
def _nothing_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a model is loaded nor an image opened."""
    monkeypatch.setattr("clipgraft.adapters.open.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(pictures, "open_image", lambda *_, **__: pytest.fail("an image was opened"))


@pytest.fixture
def wrong(table: Path, tmp_path: Path) -> dict[str, Path]:
    """A table without captions, and a file where a folder is to be."""
    other = tmp_path / "val.csv"
    other.write_text("filepath,words\na.jpg,a red shoe\n", encoding="utf-8")
    file = tmp_path / "notes.txt"
    file.write_text("", encoding="utf-8")
    return {"val": other, "file": file}


def starts(outcome: Any) -> list[str]:
    """The beginnings of the lines of an error."""
    assert (outcome.code, outcome.out) == (2, "")
    return [line.removeprefix("clipgraft: ")[:24] for line in outcome.err.splitlines()]


def test_train(cli: Any, base: list[str], table: Path, wrong: dict[str, Path]) -> None:
    """Five slips cost five times the minutes of opening all images."""
    words = ["--train-data", table, "--val-data", wrong["val"], "--logs", wrong["file"], "--batch-size", 500]
    words += [
        "--use-lora",
        "--lora-targets",
        "text-atention",
        "--device",
        "cuda:99",
        "--lock-image-unlocked-groups",
        1,
    ]
    outcome = cli("train", *base, *words)
    found = "\n".join(starts(outcome))
    for part in (
        "--lock-image-unlocked-gr",
        "--logs ",
        "--val-data",
        "24 captions do not fill ",
        "--device cuda:99",
    ):
        assert part in found, part
    assert "near misses: text-attention" in outcome.err
    assert "--csv-caption-key" in outcome.err
    assert len(starts(outcome)) == 6


def test_sweep(cli: Any, base: list[str], table: Path, wrong: dict[str, Path]) -> None:
    """A night's sweep ends at its last target set, which was misspelt."""
    words = ["--train-data", table, "--val-data", table, "--test-data", wrong["val"], "--logs", wrong["file"]]
    outcome = cli("sweep", *base, *words, "--targets", "text-attention;vision-atention", "--batch-size", 500)
    assert len(starts(outcome)) == 4
    assert "--targets: 'vision-atention' matches no site" in outcome.err


def test_eval_and_encode(
    cli: Any, base: list[str], table: Path, wrong: dict[str, Path], tmp_path: Path
) -> None:
    """The model is loaded, and only then the place for the result is found to be none."""
    outcome = cli(
        *("eval", *base, "--val-data", wrong["val"], "--out", wrong["file"] / "m.json"),
        *("--adapter", tmp_path / "nowhere", "--device", "cuda:99"),
    )
    assert len(starts(outcome)) == 4
    outcome = cli(
        *("encode", table, wrong["file"], *base, "--adapters", f"{tmp_path / 'a'},{tmp_path / 'b'}"),
        *("--device", "cuda:99"),
    )
    assert len(starts(outcome)) == 4


def test_compact(cli: Any, hf_folder: Path, table: Path, wrong: dict[str, Path], tmp_path: Path) -> None:
    """The smaller model is cut before its data turn out to be unusable."""
    words = ["--text-layers", 1, "--distill-data", table, "--val-data", wrong["val"], "--batch-size", 500]
    outcome = cli("compact", f"hf:{hf_folder}", tmp_path / "out", *words, "--run", wrong["file"])
    assert len(starts(outcome)) == 3


def test_report_and_merge(cli: Any, wrong: dict[str, Path]) -> None:
    """Everything is measured or merged, and then there is no place for it."""
    below = wrong["file"] / "in"
    outcome = cli(
        "report", "logs", "--out", below / "page.html", "--retained", wrong["val"], "--device", "cuda:99"
    )
    assert len(starts(outcome)) == 3
    assert starts(cli("merge", "adapter", below / "model"))[0].startswith("OUT ")


def test_a_misspelt_model(cli: Any, table: Path) -> None:
    """A misspelt model is told after everything else is right."""
    outcome = cli("train", "--train-data", table, "--model", "ViT-B-31", "--use-lora", "--batch-size", 99)
    assert len(starts(outcome)) == 2
    assert "--model ViT-B-31: no model 'ViT-B-31'" in outcome.err


def test_a_misspelt_run(cli: Any, table: Path, tmp_path: Path) -> None:
    """Who misspells a run's name is told about hubs and open_clip, not which runs are there."""
    (tmp_path / "logs" / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "one" / "events.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "logs" / "one" / "params.json").write_text("{}", encoding="utf-8")
    outcome = cli("eval", "--model", tmp_path / "logs" / "on", "--val-data", table)
    assert outcome.code == 2
    assert f"logs/on is not there; {tmp_path}/logs holds 1 run: name one, like" in outcome.err


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A place that cannot be written is found when the run is over, or a check leaves files behind."""
    (tmp_path / "file").write_text("")
    assert checks.output_faults("--out", tmp_path / "a" / "b" / "c.json") == []
    assert checks.output_faults("--logs", tmp_path / "new", folder=True) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for name, folder, told in (
        ("file", True, "is a file: name a folder"),
        ("file/in", True, "is a file, and no folder can be made below it"),
        ("", False, "is a folder: name a file in it"),
    ):
        (fault,) = checks.output_faults("--out", tmp_path / name, folder=folder)
        assert told in fault
    (fault,) = checks.output_faults("--out", Path("/proc/clipgraft/here"), folder=True)
    assert "cannot write in /proc" in fault


def test_a_table_that_fills_a_step(table: Path) -> None:
    """Data that are enough are refused, or all of a huge table is read to find out."""
    spec = TableFlags()
    assert checks.batch_faults(table, spec, TrainArgs(batch_size=24)) == []
    (fault,) = checks.batch_faults(table, spec, TrainArgs(batch_size=4, accum_freq=7))
    assert (
        fault
        == "24 captions do not fill one batch of --batch-size 4 x --accum-freq 7: use --batch-size 3 or less"
    )
    assert len(checks.batch_faults(table, spec, TrainArgs(batch_size=13), processes=2)) == 1


def test_each_fault_once() -> None:
    """The same line twice makes two faults of one."""
    with pytest.raises(ConfigError, match=r"^a\nb$"):
        checks.refuse(["a", "b", "a"])
    checks.refuse([])
