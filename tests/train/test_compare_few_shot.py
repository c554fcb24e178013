"""Few-shot modes beside each other: cells, what goes on and what is refused, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.data.class_splits import ClassSplits
from clipgraft.data.datasets import Labelled
from clipgraft.evaluate.classification import evaluate_classification
from clipgraft.models.clip import Clip
from clipgraft.train.fewshot import compare
from clipgraft.train.fewshot.args import MODES, FewShotArgs
from clipgraft.train.fewshot.compare import FewShotData, compare_few_shot
from clipgraft.train.fewshot.results import FewShotCell, FewShotCellResult, FewShotComparison

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30), "white": (230, 230, 230)}
FEATURES = cg.FeatureArgs(workers=0, autocast=False)
QUICK = {"shots": (1, 2), "seeds": 1, "steps_per_shot": 2, "views": 2, "feature_epochs": 2}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> ClassSplits:
    """Three pictures of each of four colours to draw from, and two to test on."""
    folder, parts = tmp_path_factory.mktemp("colours"), []
    for part, count in (("train", 3), ("test", 2)):
        images, labels = [], []
        for label, (name, colour) in enumerate(COLOURS.items()):
            for number in range(count):
                path = folder / f"{part}-{name}{number}.png"
                Image.new("RGB", (40, 40), tuple(min(255, c + 4 * number) for c in colour)).save(path)
                images.append(path)
                labels.append(label)
        parts.append(Labelled(tuple(images), tuple(labels), tuple(COLOURS)))
    return ClassSplits(parts[0], parts[1], tuple(COLOURS))


@pytest.fixture
def data(splits: ClassSplits) -> FewShotData:
    return FewShotData(splits, tuple((f"a {name} picture",) for name in splits.names))


def test_all_modes_beside_each_other(
    clip: Clip, data: FewShotData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode is missing in the table, leaves its base changed, or is trained again when it is finished."""
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in clip.model.parameters()]
    args, out = FewShotArgs(setting="base-to-novel", **QUICK), tmp_path / "out"
    found = compare_few_shot(clip, data, args, out=out, features=FEATURES)
    assert [row.mode for row in found.rows] == ["zero-shot", *MODES, *MODES]
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.model.state_dict().items())
    assert [parameter.requires_grad for parameter in clip.model.parameters()] == trainable
    for result in found.cells:
        base, novel = result.metrics["base"], result.metrics["novel"]
        mean = 2 / (1 / base + 1 / novel) if base and novel else 0.0
        assert result.metrics["harmonic mean"] == pytest.approx(mean)

    base, novel = data.splits.halves()
    adapted = cg.load_adapter(clip, out / "cells" / "clip-lora-2shots-seed1" / "run" / "adapter")
    accuracy = evaluate_classification(clip, novel.test, data.prompts[2:], FEATURES).metrics["acc1"]
    cell = next(c for c in found.cells if c.cell == FewShotCell("clip-lora", 2, 1))
    assert cell.metrics["novel"] == accuracy, f"{adapted} is not what was measured"
    assert cell.trained == sum(layer.numel() for layer in clip.model.parameters() if layer.requires_grad)
    cg.remove_lora(clip)

    table = json.loads((out / "shots-2.json").read_text())
    assert {row["mode"] for row in table["rows"]} == {"zero-shot", *MODES}
    monkeypatch.setattr(compare, "_TOWER_MODES", dict.fromkeys(("clip-lora", "2sfs")))
    monkeypatch.setattr(compare, "FEATURE_MODES", {})
    assert compare_few_shot(clip, data, args, out=out, features=FEATURES) == found
    with pytest.raises(cg.errors.CheckpointError, match="run with another steps"):
        compare_few_shot(clip, data, args.replace(steps_per_shot=3), out=out, features=FEATURES)


def test_what_cannot_be_compared_is_refused(
    make_clip: Callable[[], Clip], data: FewShotData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer images than shots, or a class on both sides, go unsaid; files of somebody else are replaced."""
    clip = make_clip()
    args = FewShotArgs(modes="tip-adapter", shots="4", seeds=1, views=1)
    strict = FewShotData(data.splits, data.prompts, strict=True)
    with pytest.raises(cg.errors.DataError, match="4 of 4 classes have fewer than 4 training images"):
        compare_few_shot(clip, strict, args, out=tmp_path / "strict", features=FEATURES)
    compare_few_shot(clip, data, args, out=tmp_path / "short", features=FEATURES)
    assert "4 classes with fewer than 4 images" in caplog.text

    names = ("blue", "green", "blue", "white")
    twice = ClassSplits(data.splits.train, data.splits.test, names)
    novel = args.replace(setting="base-to-novel")
    compare_few_shot(clip, FewShotData(twice, data.prompts), novel, out=tmp_path / "two", features=FEATURES)
    assert "1 name is that of a base class and of a novel one, such as blue" in caplog.text
    with pytest.raises(cg.errors.DataError, match=r"1 name is that .*: mend that, or drop `strict`"):
        compare_few_shot(clip, FewShotData(twice, data.prompts, strict=True), novel, out=tmp_path / "three")

    seen = Labelled(
        (data.splits.train.images[0], *data.splits.test.images[1:]), data.splits.test.labels, tuple(COLOURS)
    )
    seen_too = FewShotData(ClassSplits(data.splits.train, seen, tuple(COLOURS)), data.prompts)
    compare_few_shot(clip, seen_too, args, out=tmp_path / "seen", features=FEATURES)
    assert "1 of 8 test images are among those to draw from" in caplog.text
    with pytest.raises(cg.errors.DataError, match="1 of 8 test images"):
        compare_few_shot(clip, replace(seen_too, strict=True), args, out=tmp_path / "four")
    assert not any((tmp_path / name).exists() for name in ("strict", "three", "four"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine")
    with pytest.raises(cg.errors.ConfigError, match="holds what no comparison made"):
        compare_few_shot(clip, data, args, out=tmp_path / "mine", features=FEATURES)
    cg.apply_lora(clip, r=2)
    with pytest.raises(cg.errors.AdapterError, match="start from a base"):
        compare_few_shot(clip, data, args, out=tmp_path / "adapter", features=FEATURES)


def test_the_table_has_means_deviations_and_their_numbers() -> None:
    """Numbers of the papers are taken for ours, or a deviation is over something else than seeds."""
    cells = [FewShotCellResult(FewShotCell("zero-shot"), {"accuracy": 0.5})]
    cells += [
        FewShotCellResult(FewShotCell("clip-lora", 16, seed), {"accuracy": share}, 48, 1234, 2.0)
        for seed, share in ((1, 0.6), (2, 0.7))
    ]
    table = FewShotComparison("all", tuple(cells)).table()
    assert table.columns == ("mode", "16 shots", "trained weights", "seconds")
    assert table.rows == (
        ("zero-shot", "50.0", "0", ""),
        ("clip-lora", "65.0 ± 7.1", "1,234", "2.00"),
        ("clip-lora, theirs", "83.0", "", ""),
    )
    assert "not of this data" in table.note
    others = FewShotComparison("all", (cells[0], replace(cells[1], cell=FewShotCell("prolip", 16, 1))))
    assert "theirs" not in others.table().text().lower(), "numbers of a mode that was not compared"
