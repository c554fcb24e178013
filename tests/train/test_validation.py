"""The base before the first step, the best epoch, and what the run folder holds of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipgraft as cg
from clipgraft.errors import ConfigError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.head import load_head
from clipgraft.models.clip import Clip
from clipgraft.train.recipes import contrastive
from clipgraft.train.validation import Validation
from fitting import groups

MakeClip = Callable[[], Clip]
WORDS = ["a picture of thing number 3", "the same words"]


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> cg.train.FitResult:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "epochs": 3,
        "lr": 1e-2,
        "workers": 0,
        "progress": False,
        "strength": "none",
    }
    settings["strength"] = "none"
    return cg.fit(clip, pairs, pairs, **groups(out=out, **{**settings, **options}))


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Evaluations say that R@1 is what they are told; the first is of the base."""
    real, left = contrastive.measure_retrieval, list(scores)

    def measure(*args: Any) -> Measured:
        found = real(*args)
        score = left.pop(0)
        return Measured(
            {**found.metrics, "image_to_text_R@1": score, "text_to_image_R@1": score}, found.outcomes
        )

    monkeypatch.setattr(contrastive, "measure_retrieval", measure)


@pytest.mark.parametrize("targets", ["text-attention", "linear", None])
def test_the_base_is_measured_before_the_first_step(
    targets: str | None, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Without the base's numbers nobody sees that a run bought nothing."""
    clip = make_clip()
    if targets is not None:
        cg.apply_lora(clip, r=2, targets=targets)
    result = fit(clip, pairs, tmp_path / "run", epochs=1, lr=1e-4)
    base = cg.evaluate_retrieval(make_clip(), pairs, workers=0)
    assert result.base == pytest.approx(base)
    first = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["step"], first["epoch"]) == ("val", 0, 0)
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())
    assert recorded["base"] == result.base
    assert result.verdict is not None
    assert recorded["verdict"]["word"] == result.verdict.word
    assert "epoch 0, the base: image_to_text_R@1" in (tmp_path / "run" / "out.log").read_text()


def test_an_epoch_is_measured_with_its_own_weights(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Copies in bf16 of the weights before training would be measured, and the wrong epoch be the best."""
    clip = make_clip()
    result = fit(clip, pairs, tmp_path / "run", epochs=1, lr=1e-2, autocast=True)
    found = cg.evaluate_retrieval(clip, pairs, workers=0, autocast=True)
    assert {name: result.metrics[name] for name in found} == pytest.approx(found)


def test_measuring_the_base_changes_no_bit_of_the_run(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A look at the base must not draw from the random streams of training."""
    saved: list[dict[str, Tensor]] = []
    for name, val in (("with", pairs), ("without", None)):
        clip = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(clip, r=2, dropout=0.3, targets="linear")
        cg.fit(
            clip, pairs, val, **groups(out=tmp_path / name, batch_size=8, epochs=1, workers=0, progress=False)
        )
        saved.append({key: tensor.clone() for key, tensor in cg.adapters.lora_state_dict(clip).items()})
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in saved[0].items())


@pytest.mark.parametrize("lora", [True, False])
def test_the_best_epoch_is_kept_and_the_last_beside_it(
    lora: bool, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that got worse from epoch to epoch must not be what a run hands over."""
    clip = make_clip()
    if lora:
        cg.apply_lora(clip, r=2, dropout=0.0)
    scored(monkeypatch, [0.5, 0.2, 0.7, 0.1])
    run = tmp_path / "run"
    result = fit(clip, pairs, run, lr=1e-2 if lora else 1e-4)
    assert result.best_epoch == 2
    assert result.metrics["epoch"] == 2
    log = (run / "out.log").read_text()
    assert "kept epoch 2 of 3, the best on the validation data; the last one, image_to_text_R@1 10.0 %" in log

    def features(*names: str) -> list[Tensor]:
        found = []
        for name in names:
            if lora:
                fresh = make_clip()
                cg.load_adapter(fresh, run / name)
            else:
                fresh = make_clip()
                state = torch.load(run / f"{name}.pt", weights_only=True)["state_dict"]
                fresh.model.load_state_dict(state)
            found.append(fresh.encode_text(WORDS))
        return found

    best, last = features("checkpoints/epoch_2", "checkpoints/epoch_3")
    assert not torch.equal(best, last)
    assert torch.equal(clip.encode_text(WORDS), best)
    if lora:
        assert torch.equal(*features("adapter", "checkpoints/epoch_2"))
        assert cg.read_adapter(run / "adapter").metrics["epoch"] == 2
    else:
        assert result.saved == run / "checkpoints" / "epoch_2.pt"


def test_the_best_model_is_saved_though_its_epoch_was_not_due(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--save-frequency 0` saves the last epoch alone, which may be the worst."""
    scored(monkeypatch, [0.5, 0.7, 0.2, 0.1])
    result = fit(clip, pairs, tmp_path / "run", save_frequency=0, lr=1e-4)
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"best.pt", "latest.pt", "epoch_1.pt", "epoch_3.pt"}
    assert result.saved.name == "epoch_1.pt"
    state = torch.load(result.saved, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, clip.model.state_dict()[name]) for name, tensor in state.items())


def test_of_equal_epochs_the_last_is_kept(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On easy data every epoch is perfect, and the first one is the least trained."""
    cg.apply_lora(clip, r=2)
    monkeypatch.setattr("clipgraft.train.validation._ORDER", (("image_to_text_R@1",),))
    scored(monkeypatch, [0.5, 0.7, 0.7, 0.6])
    assert fit(clip, pairs, tmp_path / "run").best_epoch == 2


def test_a_trained_head_is_that_of_the_best_epoch(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier of the last epoch on an adapter of the best is neither."""
    data = cg.Labelled(pairs.images, tuple(number % 2 for number in range(len(pairs))), ("a", "b"))
    prompts = [["letter a"], ["letter b"]]
    cg.apply_lora(clip, r=2, targets="vision-attention")
    real, noted = Validation.add, []

    def add(self: Validation, epoch: int, measured: Measured) -> None:
        noted.append(measured.metrics["loss"])
        real(self, epoch, measured)

    monkeypatch.setattr(Validation, "add", add)
    monkeypatch.setattr(
        "clipgraft.train.validation._order", lambda metrics: [-abs(metrics["loss"] - noted[0])]
    )
    out = tmp_path / "run"
    result = cg.fit_classifier(
        clip,
        data,
        data,
        **groups(
            prompts=prompts,
            out=out,
            head="linear",
            epochs=3,
            lr=1e-2,
            batch_size=4,
            workers=0,
            progress=False,
        ),
    )
    assert result.best_epoch == 1
    head, _ = load_head(out / "head")
    last = torch.load(out / "checkpoints" / "latest.pt", weights_only=True)["weights"]
    best = torch.load(out / "checkpoints" / "best.pt", weights_only=True)["weights"]
    assert torch.equal(head.weight.cpu(), best["head.weight"])
    assert not torch.equal(last["head.weight"], best["head.weight"])


def test_an_adapter_that_goes_on_is_compared_with_its_start(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """An adapter that was good already, and got worse, is still better than the base."""
    cg.apply_lora(clip, r=2)
    first = fit(clip, pairs, tmp_path / "first")
    second = fit(clip, pairs, tmp_path / "second", epochs=1)
    assert first.verdict is not None
    assert second.verdict is not None
    assert first.verdict.than == "the base"
    assert second.verdict.than == "the adapter that it began with"
    assert second.base == pytest.approx({k: v for k, v in first.metrics.items() if k != "epoch"})


@pytest.mark.parametrize("init", ["default", "pissa", "eva"])
def test_every_start_is_the_base(init: Any, clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """PiSSA's factors are not zero, but what they change is."""
    cg.apply_lora(clip, r=2, init=init, targets="linear+embedding")
    result = fit(clip, pairs, tmp_path / "run", epochs=1)
    assert result.verdict is not None
    assert result.verdict.than == "the base"


def test_without_validation_data_it_says_that_nothing_is_known(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Silence reads like success."""
    cg.apply_lora(clip, r=2)
    result = cg.fit(
        clip, pairs, **groups(out=tmp_path / "run", batch_size=8, epochs=1, workers=0, progress=False)
    )
    assert (result.base, result.verdict, result.metrics) == (None, None, {})
    assert "without `val_data` nobody knows" in (tmp_path / "run" / "out.log").read_text()


def test_a_damaged_record_is_named(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A stranger's run folder, or a full disk, must not end in a traceback."""
    cg.apply_lora(clip, r=2)
    fit(clip, pairs, tmp_path / "run", epochs=1)
    record = tmp_path / "run" / "validation.json"
    record.write_text('{"best": 3}')
    with pytest.raises(cg.errors.CheckpointError, match=r"validation\.json: best is 3, .* remove it"):
        fit(clip, pairs, tmp_path / "run", epochs=1, resume=True)
    record.unlink()
    assert fit(clip, pairs, tmp_path / "run", epochs=1, resume=True).verdict is None


def test_patience_ends_a_run_and_keeps_its_best_epoch(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would train on for hours after its best epoch, or hand over the last one."""
    clip = make_clip()
    cg.apply_lora(clip, r=2)
    scored(monkeypatch, [0.5, 0.2, 0.7, 0.1, 0.3, 0.9])
    result = fit(clip, pairs, tmp_path / "run", epochs=5, patience=2, save_frequency=0)
    assert (result.best_epoch, result.stopped) == (2, 4)
    assert [line["epoch"] for line in result.history] == [1, 2, 3, 4]
    log = (tmp_path / "run" / "out.log").read_text()
    assert "stopped after epoch 4 of 5: `patience=2`" in log
    assert "kept epoch 2 of 4, the best on the validation data" in log
    assert "is checkpoints/epoch_4" in log
    assert (tmp_path / "run" / "checkpoints" / "epoch_4").is_dir()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stopped"] == 4


def test_a_run_that_patience_ended_stays_ended(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Resuming a finished run would train epochs that nobody waits for."""
    for resume in (False, True):
        clip = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(clip, r=2)
        with pytest.MonkeyPatch.context() as patch:
            scored(patch, [0.3] if resume else [0.5, 0.7, 0.2, 0.3])
            result = fit(clip, pairs, tmp_path / "run", epochs=6, patience=2, resume=resume)
        assert (result.best_epoch, result.stopped) == (1, 3)


def test_patience_with_a_better_epoch_changes_nothing(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would end although it still gets better."""
    clip = make_clip()
    cg.apply_lora(clip, r=2)
    scored(monkeypatch, [0.1, 0.2, 0.1, 0.4, 0.3])
    result = fit(clip, pairs, tmp_path / "run", epochs=4, patience=2)
    assert (result.best_epoch, result.stopped) == (3, None)


@pytest.mark.parametrize(("epochs", "stopped"), [("auto", 6), (8, None)])
def test_patience_by_itself(
    make_clip: MakeClip,
    pairs: cg.Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int | str,
    stopped: int | None,
) -> None:
    """A run that is not told its epochs makes ten that are thrown away; one that is told makes fewer."""
    clip = make_clip()
    cg.apply_lora(clip, r=2)
    scored(monkeypatch, [0.5, 0.7, *[0.6] * 20])
    result = fit(clip, pairs, tmp_path / "run", epochs=epochs, save_frequency=0)
    assert (result.best_epoch, result.stopped) == (1, stopped)
    params = json.loads((tmp_path / "run" / "params.json").read_text())
    assert params["patience"] == (5 if stopped else None), "the record says what was done"
    assert ("stopped after epoch 6 of 15: `patience=5`" in (tmp_path / "run" / "out.log").read_text()) == (
        stopped is not None
    )


def test_seconds_by_stage_are_of_the_run(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Nobody could see where the time of a run went, or would count some of it twice."""
    clip = make_clip()
    cg.apply_lora(clip, r=2)
    result = fit(clip, pairs, tmp_path / "run", epochs=2)
    assert {"encoding what is constant", "trials", "evaluation of the base", "training", "evaluation"} <= set(
        result.stages
    )
    assert 0 < sum(result.stages.values()) <= result.seconds + 0.1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stages"] == result.stages


def test_patience_needs_validation_data(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Nothing would tell which epoch is the best, and the option would be ignored in silence."""
    with pytest.raises(ConfigError, match="`patience` needs validation data"):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", batch_size=8, epochs=1, patience=1))
    assert not (tmp_path / "run").exists()
