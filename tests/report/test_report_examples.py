"""Examples: true to the models, spread over the data, kept until something changes."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clipgraft as cg
from clipgraft.data.args import FeatureArgs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.evaluate.error_analysis import RecallGroups
from clipgraft.report import evaluate_run
from clipgraft.report.evaluate_run import ComputeOptions, _spread, compute_examples
from clipgraft.report.examples import Examples, _fit, stored_examples
from clipgraft.report.runs import read_run, read_sweep
from clipgraft.report.write_report import write_report
from html_pages import read_page
from tiny_pictures import IMAGES

CPU = ComputeOptions(torch.device("cpu"), FeatureArgs(workers=0))


@pytest.fixture(scope="module")
def examples(world: Any) -> Examples:
    return compute_examples(read_run(world.run), CPU)


def test_retrieval_as_a_plain_loop_finds_it(examples: Examples, world: Any) -> None:
    """The gallery shows images that the model did not find, ranks them wrongly, or swaps base and adapted."""
    pairs = cg.read_pairs(world.table)
    clip = cg.load(world.run)
    scores: dict[str, Any] = {}
    for name in ("base", "adapted"):
        (cg.disable_lora if name == "base" else cg.enable_lora)(clip)
        images = encode_images(clip, pairs.images, workers=0)
        captions = encode_captions(clip, [text for _, text in pairs.rows()])
        scores[name] = [[float(c @ i) for i in images] for c in captions]
    ranks = {
        name: [
            1 + sum(other > row[owner] for k, other in enumerate(row) if k != owner)
            for row, (owner, _) in zip(rows, pairs.rows(), strict=True)
        ]
        for name, rows in scores.items()
    }
    counted = {"fixed": 0, "broken": 0, "both right": 0, "both wrong": 0}
    for before, after in zip(ranks["base"], ranks["adapted"], strict=True):
        kind = ("both right", "broken", "fixed", "both wrong")[2 * (before > 1) + (after > 1)]
        counted[kind] += 1
    assert examples.counts == counted
    texts = [text for _, text in pairs.rows()]
    for query in examples.queries:
        rows = [
            k
            for k, (owner, text) in enumerate(pairs.rows())
            if text == query.caption and str(pairs.images[owner].absolute()) == examples.images[query.image]
        ]
        (row,) = rows
        assert texts[row] == query.caption
        for name, found in (("base", query.base), ("adapted", query.adapted)):
            assert found.rank == ranks[name][row]
            order = sorted(range(IMAGES), key=lambda k: -scores[name][row][k])[:5]
            assert [examples.images[i] for i in found.images] == [
                str(pairs.images[k].absolute()) for k in order
            ]
            assert found.scores == pytest.approx([scores[name][row][k] for k in order], abs=1e-4)
    for name in ("base", "adapted"):
        metrics = getattr(examples, name)
        assert metrics["text_to_image_R@1"] == sum(rank == 1 for rank in ranks[name]) / len(texts)
        heat = getattr(examples.heat, name)
        for row, image in enumerate(examples.heat.images):
            owner = [str(path.absolute()) for path in pairs.images].index(examples.images[image])
            first = texts.index(examples.heat.texts[row])
            assert heat[row][row] == pytest.approx(scores[name][first][owner], abs=1e-4)


def test_classes_as_the_files_say(world: Any) -> None:
    """The confusion matrix is of other images, or transposed, or that of the prompts instead of the head."""
    run = read_run(world.classes)
    examples = compute_examples(run, CPU)
    classes = examples.classes
    assert classes is not None
    assert classes.head == "linear"
    right = sum(row[place] for place, row in enumerate(classes.adapted))
    assert right / sum(map(sum, classes.adapted)) == pytest.approx(run.metrics["acc1"])
    assert examples.adapted["loss"] == pytest.approx(run.metrics["loss"], rel=1e-4)
    for pair in classes.pairs:
        assert classes.adapted[pair.true][pair.taken_for] == pair.adapted
        shown = {Path(examples.images[image]).parent.name for image in pair.images}
        assert shown == {classes.names[pair.true]}


def test_a_fine_tuned_model_beside_its_base(world: Any) -> None:
    """Full fine-tuning is shown as its own base."""
    run = read_sweep(world.sweep).runs["full-seed0"]
    assert run.kind == "full"
    made = compute_examples(run, CPU)
    record = json.loads((world.sweep / "cells" / "full-seed0" / "cell.json").read_text())["result"]["metrics"]
    base = json.loads((world.sweep / "cells" / "base" / "cell.json").read_text())["result"]["metrics"]
    for metric in ("image_to_text_mean_rank", "text_to_image_mean_rank"):
        assert made.adapted[metric] == pytest.approx(record[metric])
        assert made.base[metric] == pytest.approx(base[metric])


def test_the_second_report_loads_no_model(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at a report costs the encoding of all validation images."""
    first = write_report([copied], tmp_path / "first.html").read_text(encoding="utf-8")
    known = stored_examples(read_run(copied))
    assert known == compute_examples(read_run(copied), CPU)
    monkeypatch.setattr(evaluate_run, "base_and_adapted", None)
    second = write_report([copied], tmp_path / "second.html").read_text(encoding="utf-8")
    assert first.count("<symbol") == second.count("<symbol") > 0


def test_examples_follow_the_adapter(copied: Path) -> None:
    """A run that was trained on shows what an earlier adapter found."""
    run = read_run(copied)
    write_report([copied], copied / "report.html")
    assert stored_examples(run) is not None
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert stored_examples(read_run(copied)) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "key": "KEY", "examples": {"task": 3}}'])
def test_damaged_examples_are_made_again(text: str, copied: Path, tmp_path: Path) -> None:
    """A cache file that was cut short keeps the report from being made."""
    write_report([copied], tmp_path / "report.html")
    file = copied / "results" / "examples.json"
    key = json.loads(file.read_text())["key"]
    file.write_text(text.replace("KEY", key))
    assert "no examples" not in read_page(write_report([copied], tmp_path / "again.html")).text
    assert stored_examples(read_run(copied)) is not None


def test_errors_of_one_model_alone_are_made_again(examples: Examples) -> None:
    """Errors that a stranger's file names for one model only end the report in a traceback."""
    assert _fit(examples)
    assert examples.errors is not None
    lame = replace(examples.errors, first={"base": 1})
    assert not _fit(replace(examples, errors=lame))
    empty = replace(examples.errors.by_length.groups[0], captions=0)
    lame = replace(examples.errors, by_length=RecallGroups("words", (empty,)))
    assert not _fit(replace(examples, errors=lame))


def test_missing_images_are_counted(world: Any, tmp_path: Path) -> None:
    """Data that were tidied away since end the report, or change it silently."""
    pictures = Path(shutil.copytree(world.table.parent, tmp_path / "pictures"))
    run = Path(shutil.copytree(world.run, tmp_path / "logs" / "run"))
    params = json.loads((run / "params.json").read_text())
    params |= {"train_data": str(pictures / "pairs.csv"), "val_data": "pictures/pairs.csv"}
    (run / "params.json").write_text(json.dumps(params))
    (pictures / "3.png").unlink()
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert "1 validation image is missing or unreadable, and left out" in page.text
    shown = json.loads((run / "results" / "examples.json").read_text())["examples"]["images"]
    Path(shown[0]).unlink()
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert "1 of the pictures to show is no longer where the data name them" in page.text
    assert page.all("span", class_="lost")
    shutil.rmtree(pictures)
    page = read_page(write_report([run], tmp_path / "report.html"))
    assert "its data pictures/pairs.csv are not there" in page.text


@given(st.lists(st.integers(), unique=True, max_size=60), st.integers(1, 12))
def test_examples_are_spread(rows: list[int], number: int) -> None:
    """A gallery shows the same caption twice, or the first few of the data alone."""
    chosen = _spread(rows, number)
    assert len(chosen) == min(number, len(rows))
    places = [rows.index(row) for row in chosen]
    assert places == sorted(set(places))
    if len(rows) > number:
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert all(abs(gap - len(rows) / number) <= 1 for gap in gaps)
