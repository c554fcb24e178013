"""`lr=auto`: the learning rate is found on the training data, at a bounded cost, and changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train import rate
from clipgraft.train.fit import FitResult
from clipgraft.train.rate import ADAPTER_RATE, ADAPTER_RATES, MODEL_RATE, SHARE, Plan, plan_trials
from fitting import groups

MakeClip = Callable[[], Clip]
QUICK: dict[str, Any] = {"batch_size": 4, "epochs": 40, "workers": 0, "progress": False, "val_frequency": 0}


def adapted(make_clip: MakeClip) -> Clip:
    clip = make_clip()
    torch.manual_seed(0)
    cg.apply_lora(clip, r=4, dropout=0.1, targets="text-linear")
    return clip


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> FitResult:
    return cg.fit(clip, pairs, **groups(out=out, **{**QUICK, **options}))


def weights(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in clip.model.state_dict().items()}


def same(left: Clip, right: Clip) -> bool:
    first, second = weights(left), weights(right)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@given(total=st.integers(0, 100_000), held_out=st.integers(1, 8))
def test_a_search_costs_no_more_than_it_promises(total: int, held_out: int) -> None:
    """Half of a short run would be spent on choosing its learning rate."""
    plan = plan_trials(ADAPTER_RATES, total, held_out)
    if plan is not None:
        assert plan.cost(held_out) <= SHARE * total
        assert plan.rates in (ADAPTER_RATES, ADAPTER_RATES[1:4])


def test_the_cost_of_a_plan_is_that_of_its_trials() -> None:
    """The share that is printed would not be what the search took."""
    three, five = Plan((1.0, 2.0, 3.0), 4, 10), Plan((1.0, 2.0, 3.0, 4.0, 5.0), 4, 10)
    assert three.cost(3) == pytest.approx(3 * 4 + 2 * 10 + 3 * 6 / 3)
    assert five.cost(3) == pytest.approx(4 * 4 + 2 * 10 + 3 * 7 / 3), "one rate beyond the middle three"
    assert five.cost(3, beyond=0) == three.cost(3)


@pytest.mark.parametrize("best", range(5))
@pytest.mark.parametrize("diverges", [False, True])
def test_the_best_of_all_rates_is_among_few_trials(best: int, diverges: bool) -> None:
    """A rate outside of the middle three would never be found, or all five be paid for."""
    losses: list[float | None] = [abs(index - best) + 1.0 for index in range(5)]
    if diverges:
        losses[best + 1 :] = [None] * (4 - best)
    tried: list[float] = []

    def run(lr: float, steps: int) -> float | None:
        tried.append(lr)
        assert steps == 7
        return losses[ADAPTER_RATES.index(lr)]

    trials = rate._short_trials(Plan(ADAPTER_RATES, 7, 14), run)
    assert rate._best_first(trials)[0] == ADAPTER_RATES[best]
    assert len(tried) == (4 if best in (0, 1, 3, 4) else 3)
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_is_the_one_that_was_given_the_rate(
    full: bool, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Trials would leave weights, order or dropout changed, and nobody could repeat the run."""
    found, given_ = (make_clip(), make_clip()) if full else (adapted(make_clip), adapted(make_clip))
    result = fit(found, pairs, tmp_path / "auto", lr="auto")
    assert result.rate is not None
    assert result.rate.why is None
    assert result.rate.lr in {trial.lr for trial in result.rate.trials}
    again = fit(given_, pairs, tmp_path / "given", lr=result.rate.lr)
    assert again.rate is None
    assert same(found, given_)


def test_the_lowest_loss_decides(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that learns nothing, or throws the weights out of range, would be trained with for an hour."""
    monkeypatch.setattr(rate, "ADAPTER_RATES", (1e-12, 1e-3, 1e30))
    result = fit(adapted(make_clip), pairs, tmp_path / "run", lr="auto")
    assert result.rate is not None
    assert result.rate.lr == 1e-3
    losses = {trial.lr: trial.loss for trial in result.rate.trials}
    assert losses[1e30] is None or losses[1e30] > 1
    assert result.rate.before is not None
    assert losses[1e-12] == pytest.approx(result.rate.before, abs=1e-4), "nothing is learnt at 1e-12"
    kept = losses[1e-3]
    assert kept is not None
    assert kept < result.rate.before


def test_what_was_tried_is_recorded_and_shown(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody could say later where the rate came from."""
    with caplog.at_level("INFO", logger="clipgraft"):
        result = fit(adapted(make_clip), pairs, tmp_path / "run", lr="auto")
    assert result.rate is not None
    record = json.loads((tmp_path / "run" / "learning_rate.json").read_text())
    assert record["lr"] == result.rate.lr
    assert len(record["trials"]) == len(result.rate.trials)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rate"] == record
    told = next(line for line in caplog.messages if line.startswith("`lr=auto` takes"))
    assert f"takes {result.rate.lr:g}: loss on {result.rate.held_out} training pairs held out" in told
    assert result.rate.cost <= SHARE


@pytest.mark.parametrize(("full", "default"), [(False, ADAPTER_RATE), (True, MODEL_RATE)])
def test_a_short_run_takes_a_stated_default(
    full: bool, default: float, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A run of few steps would be refused, or spend more steps on the search than on training."""
    clip = make_clip() if full else adapted(make_clip)
    result = fit(clip, pairs, tmp_path / "run", lr="auto", epochs=2)
    assert result.rate is not None
    assert result.rate.lr == default
    assert (
        str(result.rate)
        == f"`lr=auto` takes {default:g}, untried: 15% of the run's 12 steps are too few for trials"
    )


def test_images_with_many_captions_are_not_all_held_out(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A batch that shows every image would leave trials nothing to train on: a search without end."""
    few = cg.Pairs(pairs.images[:4], [[f"{n} {m}" for m in "abcdef"] for n in range(4)])
    result = fit(adapted(make_clip), few, tmp_path / "run", lr="auto", batch_size=8, epochs=80)
    assert result.rate is not None
    assert result.rate.lr == ADAPTER_RATE
    assert result.rate.why is not None
    assert "too large a part" in result.rate.why


def test_a_resumed_run_keeps_its_rate(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of a run would train at another rate, found with other weights."""
    whole, stopped = adapted(make_clip), adapted(make_clip)
    first = fit(stopped, pairs, tmp_path / "run", lr="auto", epochs=40)
    monkeypatch.setattr(rate, "ADAPTER_RATES", (1e-9, 1e-8, 1e-7))
    longer = fit(stopped, pairs, tmp_path / "run", lr="auto", epochs=42, resume=True)
    assert longer.rate == first.rate
    assert first.rate is not None
    fit(whole, pairs, tmp_path / "whole", lr=first.rate.lr, epoch_parts=(40, 2), epochs=42)
    assert same(whole, stopped)


def test_a_damaged_record_is_one_line(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A record that a full disk cut short would end in a traceback."""
    clip = adapted(make_clip)
    fit(clip, pairs, tmp_path / "run", lr="auto", epochs=4)
    (tmp_path / "run" / "learning_rate.json").write_text('{"lr": "fast"}')
    with pytest.raises(cg.errors.CheckpointError, match=r"learning_rate\.json: lr is 'fast'") as caught:
        fit(clip, pairs, tmp_path / "run", lr="auto", epochs=6, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["prompts", "linear"])
def test_classes_and_heads_too(head: str, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`auto` would work for captions alone."""
    images = cg.Labelled(pairs.images, [n % 2 for n in range(len(pairs.images))], ["cat", "dog"])
    clip = make_clip()
    if head == "prompts":
        cg.apply_lora(clip, r=4, targets="text-linear")
    else:
        clip.model.requires_grad_(False)
    options = {**QUICK, "batch_size": 2, "epochs": 60, "lr": "auto", "head": head}
    if head != "prompts":
        options |= {"lock_image": True, "lock_text": True}
    result = cg.fit_classifier(
        clip, images, prompts=[["a cat"], ["a dog"]], **groups(out=tmp_path / "run", **options)
    )
    assert result.rate is not None
    assert result.rate.why is None
    assert {trial.lr for trial in result.rate.trials} <= set(ADAPTER_RATES), "not those of a whole model"


@pytest.mark.parametrize("lr", ["fast", "", 0, -1.0, float("nan"), None, 1e39])
def test_other_words_are_refused(lr: Any) -> None:
    """A slip of the keyboard would be taken for `auto`, or for 0."""
    with pytest.raises(cg.errors.ConfigError, match="TrainArgs: lr"):
        cg.TrainArgs(lr=lr)
