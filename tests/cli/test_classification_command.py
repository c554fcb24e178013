"""`--task classification` of `clipgraft train` and `clipgraft eval`, on tiny pictures of three classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.evaluate.head import load_head
from clipgraft.models.load import load

COLOURS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (255, 0, 0)}


def write_class(folder: Path, name: str, count: int = 6) -> None:
    """`count` pictures of one colour, each a little different."""
    (folder / name).mkdir(parents=True)
    for index in range(count):
        colour = tuple(min(255, value + index) for value in COLOURS.get(name, (90, 90, 90)))
        Image.new("RGB", (20, 20), colour).save(folder / name / f"{index}.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three class folders."""
    for name in COLOURS:
        write_class(tmp_path / "pictures", name)
    return tmp_path / "pictures"


@pytest.fixture
def classify(cli: Any, base: list[str], tmp_path: Path) -> Callable[..., Any]:
    """`clipgraft train --task classification` for a step or two."""

    def run(data: Path, *words: object) -> Any:
        flags = [
            "--task",
            "classification",
            "--train-data",
            data,
            "--logs",
            tmp_path / "logs",
            "--name",
            "run",
        ]
        return cli("train", *base, *flags, "--batch-size", 6, "--epochs", 1, "--workers", 0, *words)

    return run


@pytest.fixture
def head(classify: Callable[..., Any], pictures: Path, tmp_path: Path) -> Path:
    """A linear classifier that was trained on frozen towers."""
    outcome = classify(pictures, "--head", "linear", "--lock-image", "--lock-text", "--lr", "0.05")
    assert (outcome.code, outcome.err) == (0, "")
    return tmp_path / "logs" / "run" / "head"


def test_a_saved_classifier_is_measured(
    cli: Any, base: list[str], head: Path, pictures: Path, tmp_path: Path
) -> None:
    """The classifier that was trained cannot be measured on other pictures, or with other features."""
    out = tmp_path / "metrics.json"
    data = ["--task", "classification", "--val-data", pictures, "--workers", 0]
    outcome = cli("eval", *base, *data, "--classifier", head, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    metrics = json.loads(out.read_text())
    assert list(metrics) == ["base", "linear", "verdict"]
    clip = load(base[1], "none")
    saved, classes = load_head(head)
    images = cg.read_labelled(pictures, workers=0)
    pixels = torch.stack([clip.require_preprocess()(Image.open(path)) for path in images.images])
    with torch.no_grad():
        logits = saved(clip.encode_image(pixels))
    guessed = [classes[int(index)] for index in logits.argmax(1)]
    right = [name == images.classes[label] for name, label in zip(guessed, images.labels, strict=True)]
    assert metrics["linear"]["acc1"] == pytest.approx(sum(right) / len(right))
    assert f"{100 * metrics['linear']['acc1']:.2f}" in outcome.out


def test_a_classifier_of_other_classes(cli: Any, base: list[str], head: Path, tmp_path: Path) -> None:
    """Pictures of a class that the classifier has never seen are counted as something else."""
    write_class(tmp_path / "other", "red")
    write_class(tmp_path / "other", "grey")
    data = ["--task", "classification", "--val-data", tmp_path / "other", "--workers", 0]
    outcome = cli("eval", *base, *data, "--classifier", head)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "'grey'" in outcome.err


def test_no_classifier_there(cli: Any, base: list[str], pictures: Path) -> None:
    """A wrong folder ends in a traceback."""
    data = ["--task", "classification", "--val-data", pictures, "--workers", 0]
    outcome = cli("eval", *base, *data, "--classifier", pictures)
    assert outcome.code == 2
    assert outcome.err.startswith("clipgraft: no head to read in ")
    assert outcome.err.count("\n") == 1


def test_flags_of_training_are_none_of_eval(cli: Any, base: list[str], pictures: Path) -> None:
    """`eval` takes flags that it then ignores."""
    outcome = cli("eval", *base, "--task", "classification", "--val-data", pictures, "--shots", 2)
    assert outcome.code == 2
    assert outcome.err.startswith("clipgraft: --shots: there is no such flag")


def test_one_class_alone(classify: Callable[..., Any], tmp_path: Path) -> None:
    """A run that can learn nothing starts."""
    write_class(tmp_path / "one", "red")
    outcome = classify(tmp_path / "one", "--use-lora")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "one class" in outcome.err
    assert not (tmp_path / "logs").exists()


def test_an_empty_class_folder_is_told(classify: Callable[..., Any], pictures: Path) -> None:
    """A class that lost its pictures goes missing without a word."""
    (pictures / "yellow").mkdir()
    outcome = classify(pictures, "--use-lora")
    assert (outcome.code, outcome.err) == (0, "")
    assert "yellow" in outcome.out


def test_prompts_that_name_no_class(classify: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    """A misspelt class is trained with a prompt that nobody wrote."""
    (tmp_path / "prompts.yaml").write_text("reed: a red picture\ngreen: a green picture\n")
    outcome = classify(pictures, "--use-lora", "--prompts", tmp_path / "prompts.yaml")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "reed" in outcome.err
    assert "red" in outcome.err.replace("reed", "")


def test_unreadable_images_are_counted(classify: Callable[..., Any], pictures: Path) -> None:
    """One damaged picture ends the run, or is left out without a word."""
    (pictures / "red" / "0.png").write_bytes(b"no picture")
    outcome = classify(pictures, "--use-lora")
    assert (outcome.code, outcome.err) == (0, "")
    assert "unreadable images   1 " in outcome.out
    assert "image 13: red/0.png" in outcome.out
    assert "17 images, batches of 6" in outcome.out


def test_a_class_absent_from_validation(classify: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    """Recall averages over a class that has no picture, or nobody is told that it is missing."""
    for name in ("red", "green"):
        write_class(tmp_path / "val", name, 2)
    outcome = classify(pictures, "--use-lora", "--val-data", tmp_path / "val")
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 class without an image in the validation data: blue" in outcome.out


def test_validation_classes_that_are_unknown(
    classify: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    """A class that cannot be predicted is counted as wrong."""
    for name in ("red", "grey"):
        write_class(tmp_path / "val", name, 2)
    outcome = classify(pictures, "--use-lora", "--val-data", tmp_path / "val")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "'grey'" in outcome.err


def test_a_class_too_small_to_hold_out(classify: Callable[..., Any], pictures: Path) -> None:
    """A class of one picture vanishes from training, or from the warning."""
    write_class(pictures, "grey", 1)
    outcome = classify(pictures, "--use-lora", "--val-size", "0.3")
    assert (outcome.code, outcome.err) == (0, "")
    assert "grey" in outcome.out


def test_a_run_hands_over_its_results(classify: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    """A finished run lacks its result.json, or the one of a run without validation data invents a metric."""
    outcome = classify(pictures, "--use-lora", "--val-size", "0.3")
    assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / "logs" / "run"
    result = json.loads((folder / "results" / "result.json").read_text())
    last = json.loads((folder / "results.json").read_text())["history"][-1]
    del last["epoch"]
    assert result["test_result"] == [last]
    assert {path.name for path in (folder / "results").iterdir()} == {
        "result.json",
        "structure.txt",
        "summary.txt",
    }


def test_prompt_weights_are_learnt(cli: Any, base: list[str], pictures: Path, tmp_path: Path) -> None:
    """Learnt weights are not those that `--prompts` then uses, or a file of the user's is replaced."""
    learnt, out = tmp_path / "learnt.yaml", tmp_path / "metrics.json"
    data = ["--task", "classification", "--workers", 0, "--train-data", pictures]
    learn = [*data, "--templates", "ensemble", "--learn-prompts", learnt]
    outcome = cli("eval", *base, *learn, "--val-data", pictures, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert "on the 18 training images  plain mean  learnt weights" in outcome.out
    metrics = json.loads(out.read_text())
    assert list(metrics) == ["base", "learnt prompts", "verdict"]
    again = cli(
        "eval", *base, *data, "--val-data", pictures, "--prompts", learnt, "--out", tmp_path / "b.json"
    )
    assert (again.code, again.err) == (0, "")
    assert json.loads((tmp_path / "b.json").read_text())["base"] == pytest.approx(metrics["learnt prompts"])
    assert metrics["learnt prompts"]["loss"] != pytest.approx(metrics["base"]["loss"], abs=1e-3)
    for words, message in (
        (learn, "learnt.yaml: this file was not made by clipgraft"),
        ([*data[:4], "--learn-prompts", tmp_path / "c"], "--learn-prompts needs --train-data"),
        ([*data, "--learn-prompts", tmp_path / "c"], "every class has one prompt: there is nothing to weigh"),
        ([*data[2:], "--learn-prompts", tmp_path / "c"], "without --task classification"),
        ([*learn, "--overwrite", "--out", out], "--out given without --val-data"),
    ):
        refused = cli("eval", *base, *words)
        assert refused.code == 2
        assert message in refused.err
