"""`clipgraft train --recipe translate`, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipgraft.cli.main import main


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.csv"
    rows = [f"thing number {n},vật thứ {n}" for n in range(40)]
    path.write_text("\n".join(["English,Việt", *rows, "no translation,"]), encoding="utf-8")
    return path


def test_translations_and_pairs_from_end_to_end(
    cli: Any, words: Path, table: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """The issue's command would not run, or what it prints and keeps would lack the numbers it promises."""
    model = ["--model", str(tiny_config), "--pretrained", "none", "--device", "cpu", "--precision", "fp32"]
    run = [
        "--use-lora",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--strength",
        "none",
        "--logs",
        str(tmp_path),
        "--workers",
        "0",
    ]
    given = ["train", "--recipe", "translate", "--train-data", str(words), *model, *run]
    done = cli(*given, "--name", "texts")
    assert done.code == 0
    told = done.out + done.err
    assert "skipped rows" in told
    assert "tokens for each word of the source: " in told
    assert "36 texts to train on, 4 held out" in told
    assert "image tower is frozen" not in told
    result = json.loads((tmp_path / "texts" / "results.json").read_text())
    assert {"source_to_target_R@1", "target_to_source_R@1", "teacher_cosine"} <= set(result["history"][-1])
    assert (tmp_path / "texts" / "adapter" / "adapter_model.safetensors").is_file()
    mixed = [
        "--pairs",
        str(table),
        "--val-pairs",
        str(table),
        "--val-size",
        "0.2",
        "--translation-weight",
        "3",
    ]
    done = cli(*given, *mixed, "--name", "both")
    assert done.code == 0
    told = done.out + done.err
    assert "32 texts to train on, 8 held out" in told
    result = json.loads((tmp_path / "both" / "results.json").read_text())
    assert {"text_to_image_R@1", "teacher_cosine"} <= set(result["history"][-1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--recipe", "translate", "--csv-target-key", "vi"],
            '--csv-target-key: no column "vi"; it has "English"',
        ),
        (["--csv-source-key", "English"], "--csv-source-key given without --recipe translate: add it"),
        (["--recipe", "translate", "--task", "classification"], "are two things to learn: drop one of them"),
        (
            ["--recipe", "translate", "--translation-weight", "3"],
            "--translation-weight counts beside --pairs",
        ),
        (["--recipe", "translate", "--pairs", "none.csv"], "--pairs none.csv: there is no such file"),
    ],
)
def test_wrong_flags_are_told_in_one_line(
    flags: list[str], said: str, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong column or flag would be found out after the model was loaded, or be passed over."""
    code = main(["train", "--train-data", str(words), "--model", "emoji", "--use-lora", *flags])
    assert code == 2
    assert said in capsys.readouterr().err
