"""`clipgraft eval --fiftyone`: FiftyOne's FiftyOneImageClassificationDataset, with every answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipgraft as cg
from clipgraft.data.features import image_steps
from clipgraft.models.load import load
from clipgraft.pictures import open_image

Label = dict[str, Any]


def imported(folder: Path, labels: str) -> dict[Path, Label]:
    """Read what FiftyOne's importer does, by image: `data.json` with paths, one file of labels.

    As documented: keys have no extension, a label is a dict of label, confidence and attributes, and nothing
    else, and where there are classes it is one of them.
    """
    paths = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    read = json.loads((folder / labels).read_text(encoding="utf-8"))
    assert set(read) <= {"classes", "labels"}
    assert read["labels"].keys() == paths.keys()
    for key, label in read["labels"].items():
        assert "." not in key
        assert {"label"} <= label.keys() <= {"label", "confidence", "attributes"}
        assert label["label"] in read.get("classes", [label["label"]])
        assert Path(paths[key]).is_absolute()
        assert not {"label", "confidence", "id", "tags"} & label.get("attributes", {}).keys()
    return {Path(paths[key]): label for key, label in read["labels"].items()}


def test_captions(cli: Any, base: list[str], table: Path, tmp_path: Path) -> None:
    """FiftyOne would show another caption than the model ranks first, or errors that do not add up to R@1."""
    clip = load(base[1], "none")
    torch.manual_seed(1)
    cg.apply_lora(clip, r=2, targets="text.*.*")
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter, out = cg.save_adapter(clip, tmp_path / "adapter"), tmp_path / "fo"
    words = ["eval", *base, "--val-data", table, "--workers", 0, "--adapter", adapter, "--fiftyone", out]
    outcome = cli(*words, "--out", tmp_path / "metrics.json")
    assert (outcome.code, outcome.err) == (0, "")
    pairs, metrics = cg.read_pairs(table), json.loads((tmp_path / "metrics.json").read_text())
    captions = [caption for group in pairs.captions for caption in group]
    owner = [number for number, group in enumerate(pairs.captions) for _ in group]
    with torch.inference_mode():
        pixels = torch.stack([image_steps(clip)(open_image(path)) for path in pairs.images])
        images = F.normalize(clip.encode_image(pixels), dim=-1)
        scores = images @ clip.encode_text(captions, normalize=True).T
    answers, truth = imported(out, "adapter.json"), imported(out, "labels.json")
    for number, path in enumerate(pairs.images):
        right = torch.tensor([each == number for each in owner])
        rank = 1 + int((scores[number][~right] >= scores[number][right].max()).sum())
        place = int(scores[number].argmax())
        found = answers[path.absolute()]
        assert found["label"] == captions[place]
        assert found["confidence"] == pytest.approx(float(scores[number, place]), abs=1e-5)
        assert found["attributes"] == {"error": rank > 1, "rank": rank}
        assert all(caption in truth[path.absolute()]["label"] for caption in pairs.captions[number])
    for model in ("base", "adapter"):
        errors = [each["attributes"]["error"] for each in imported(out, f"{model}.json").values()]
        assert 1 - sum(errors) / len(errors) == pytest.approx(metrics[model]["image_to_text_R@1"])


def test_classes(cli: Any, base: list[str], tmp_path: Path) -> None:
    """FiftyOne would show other classes than were predicted, or a foreign folder would be replaced."""
    for number, name in enumerate(("blue", "green", "red")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for shade in range(4):
            colour = tuple(200 - 9 * shade if channel == 2 - number else 0 for channel in range(3))
            Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / name / f"{shade}.png")
    out = tmp_path / "fo"
    words = ["eval", *base, "--task", "classification", "--val-data", tmp_path / "data", "--workers", 0]
    words += ["--fiftyone", out, "--out", tmp_path / "metrics.json", "--overwrite"]
    for _ in range(2):  # the second replaces the first
        outcome = cli(*words)
        assert (outcome.code, outcome.err) == (0, "")
    answers, truth = imported(out, "base.json"), imported(out, "labels.json")
    assert len(answers) == 12
    for path, found in answers.items():
        assert truth[path] == {"label": path.parent.name}
        wrong = found["label"] != path.parent.name
        assert found["attributes"] == {"error": wrong, "right": path.parent.name}
        assert 1 / 3 <= found["confidence"] <= 1
    accuracy = json.loads((tmp_path / "metrics.json").read_text())["base"]["acc1"]
    right = sum(not found["attributes"]["error"] for found in answers.values())
    assert right / 12 == pytest.approx(accuracy)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "note.txt").write_text("mine")
    words[words.index(out)] = theirs
    outcome = cli(*words[:-1])
    assert (outcome.code, (theirs / "note.txt").read_text()) == (2, "mine")
    assert f"--fiftyone {theirs}: this folder was not made by clipgraft" in outcome.err
