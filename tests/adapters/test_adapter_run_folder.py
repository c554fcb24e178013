"""Run folders as models, wherever a model is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.adapters.open import split_adapter
from clipgraft.adapters.run_folder import find_path, find_run_model
from clipgraft.models.clip import Clip
from fitting import groups
from tiny_pictures import write_pictures

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lr": 1e-2, "workers": 0, "progress": False}


@pytest.fixture
def pairs(tmp_path: Path) -> cg.Pairs:
    """12 images and 24 captions."""
    return cg.read_pairs(write_pictures(tmp_path / "pictures"))


def same(left: Clip, right: Clip) -> bool:
    """Whether two models say the same of a text, to the last bit."""
    with torch.no_grad():
        return torch.equal(left.encode_text(["a red shoe"]), right.encode_text(["a red shoe"]))


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_a_run_of_all_weights_is_a_model(
    kind: str, tiny_config: Path, hf_folder: Path, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """What hours of full fine-tuning made can be loaded by nothing but hand."""
    base = (str(tiny_config), "none") if kind == "open_clip" else (str(hf_folder), None)
    clip = cg.load(*base)
    cg.fit(clip, pairs, **groups(out=tmp_path / "logs" / "full", **QUICK))
    shutil.move(tmp_path / "logs", tmp_path / "moved")
    run = tmp_path / "moved" / "full"
    assert same(cg.load(run), clip)
    assert not same(cg.load(run), cg.load(*base))
    found = find_run_model(run)
    assert found is not None
    assert (found.kind, found.unfinished, found.base.name) == ("fine-tuned", None, base[0])
    with pytest.raises(cg.errors.ModelError, match="brings its own weights: leave out `pretrained` none"):
        cg.load(run, "none")
    kept = run / "checkpoints" / ("epoch_1.pt" if kind == "open_clip" else "epoch_1")
    assert same(cg.load(kept), clip)


def test_an_adapter_of_a_fine_tuned_model_finds_it(
    tiny_config: Path, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """An adapter that was trained on a run's model would be put on the model before that run."""
    cg.fit(cg.load(tiny_config, "none"), pairs, **groups(out=tmp_path / "full", **QUICK))
    clip = cg.load(tmp_path / "full")
    cg.apply_lora(clip, r=2)
    cg.fit(clip, pairs, **groups(out=tmp_path / "lora", **QUICK))
    again = cg.load(tmp_path / "lora")
    assert same(again, clip)
    assert again.fingerprint == clip.fingerprint


def test_a_folder_of_open_clip_and_its_run(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A base that brings its own weights hides those that were trained."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"model_cfg": json.loads(tiny_config.read_text()), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(cg.load(tiny_config, "none").model.state_dict(), folder / "open_clip_pytorch_model.bin")
    clip = cg.load(folder)
    cg.fit(clip, pairs, **groups(out=tmp_path / "full", **QUICK))
    assert same(cg.load(tmp_path / "full"), clip)


def test_an_unfinished_run_says_so(
    tiny_config: Path, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter of an early epoch is taken for the run's result, without a word."""
    for lora in (True, False):
        run = tmp_path / f"run-{lora}"
        clip = cg.load(tiny_config, "none")
        if lora:
            cg.apply_lora(clip, r=2)
        cg.fit(clip, pairs, **groups(out=run, **QUICK | {"epochs": 2}))
        (run / "results.json").unlink()
        if lora:
            shutil.rmtree(run / "adapter")
        caplog.clear()
        with caplog.at_level("INFO", "clipgraft"):
            assert same(cg.load(run), clip)
        assert f"{run} has not come to its end: what it saved after epoch 2 is used" in caplog.text
        shutil.rmtree(run / "checkpoints")
        with pytest.raises(
            cg.errors.CheckpointError, match="has saved no model yet: finish the run with `resume"
        ):
            cg.load(run)


def test_records_lead_to_no_other_folder(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A run folder from elsewhere has a file of this machine loaded as its weights."""
    run = tmp_path / "run"
    cg.fit(cg.load(tiny_config, "none"), pairs, **groups(out=run, **QUICK))
    other = tmp_path / "other.pt"
    shutil.move(run / "checkpoints" / "epoch_1.pt", other)
    record = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**record, "saved": str(other)}))
    with pytest.raises(cg.errors.CheckpointError, match="has saved no model yet"):
        cg.load(run)
    (run / "results.json").write_text("[1]")
    with pytest.raises(cg.errors.CheckpointError, match=r"results\.json"):
        cg.load(run)


def test_runs_that_recorded_less(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Runs of before, and of open_clip, name their base as the command line named it, or not at all."""
    run, clip = tmp_path / "run", cg.load(tiny_config, "none")
    cg.fit(clip, pairs, **groups(out=run, **QUICK))
    (run / "params.json").unlink()
    (run / "params.txt").write_text(f"model: {tiny_config}\npretrained: none\n")
    assert same(cg.load(run), clip)
    (run / "params.txt").write_text("epochs: 1\n")
    with pytest.raises(cg.errors.CheckpointError, match="does not record its base: name that, and give"):
        cg.load(run)


def test_places_near_runs(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """The folder of all runs, or a misspelt run, is called no model, and nobody says what is there."""
    logs = tmp_path / "logs"
    cg.fit(cg.load(tiny_config, "none"), pairs, **groups(out=logs / "one", **QUICK))
    shutil.copytree(logs / "one", logs / "grid" / "cells" / "full-seed0" / "run")
    with pytest.raises(
        cg.errors.ModelError, match=rf"logs is no model, but a folder that holds 1 run: .* {logs}/one"
    ):
        cg.load(logs)
    with pytest.raises(
        cg.errors.ModelError, match=rf"logs/on is not there; {logs} holds 1 run: .* {logs}/one"
    ):
        cg.load(logs / "on")
    with pytest.raises(
        cg.errors.ModelError, match=r"grid is no model, but a folder that holds 1 run: .*full-seed0"
    ):
        cg.load(logs / "grid")
    assert same(cg.load(logs / "grid" / "cells" / "full-seed0"), cg.load(logs / "one"))


def test_where_a_model_is_taken_from(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`profile RUN` and `encode --model RUN` take the adapter for a base, or the base without it."""
    clip = cg.load(tiny_config, "none")
    cg.apply_lora(clip, r=2)
    cg.fit(clip, pairs, **groups(out=tmp_path / "lora", **QUICK))
    cg.fit(cg.load(tiny_config, "none"), pairs, **groups(out=tmp_path / "full", **QUICK))
    source, adapter = split_adapter(str(tmp_path / "lora"))
    assert (source.name, source.pretrained, adapter) == (str(tiny_config), "none", tmp_path / "lora")
    source, adapter = split_adapter(str(tmp_path / "full"))
    assert (source.name, adapter) == (str(tiny_config), None)
    assert source.pretrained == str(tmp_path / "full" / "checkpoints" / "epoch_1.pt")
    with pytest.raises(
        cg.errors.AdapterError, match="a run that made no adapter, but a fine-tuned model: name it"
    ):
        cg.load_adapter(clip, tmp_path / "full")


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "['a', 'b']" * 60])
def test_a_recorded_path_that_no_file_can_have_is_not_there(name: str, tmp_path: Path) -> None:
    """A report over a stranger's run ended in a traceback, "File name too long"."""
    assert find_path(name, tmp_path) is None
