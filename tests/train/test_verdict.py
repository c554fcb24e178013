"""What a run says it bought: words, intervals, advice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.train.verdict import FEWEST_CHANGED, Trained, Verdict, judge

TEXT = {("text", "q"), ("text", "v")}


def measured(hits: list[int]) -> Measured:
    found = np.array(hits)
    outcomes = Outcomes({"acc1": found}, {"acc1": np.arange(len(found))}, {"acc1": 0.25})
    return Measured({"acc1": float(found.mean())}, outcomes)


def verdict(before: list[int], after: list[int], **trained: Any) -> Verdict:
    settings: dict[str, Any] = {"rows": 10_000, "unit": "pairs", "epochs": 10, "lr": 1e-3, "roles": None}
    run = Trained(**{**settings, "losses": (2.0, 1.0), **trained})
    return judge(measured(before), measured(after), than="the base", epoch=10, trained=run)


@pytest.mark.parametrize(
    ("gained", "lost", "word"),
    [(30, 2, "better"), (2, 30, "worse"), (10, 9, "no better"), (0, 0, "no better")],
)
def test_the_word_follows_the_interval(gained: int, lost: int, word: str) -> None:
    """A gain that noise explains must not be called one, nor a loss."""
    rest = 100 - gained - lost
    found = verdict([0] * gained + [1] * lost + [1] * rest, [1] * gained + [0] * lost + [1] * rest)
    assert found.word == word
    assert str(found).startswith(f"{word} than the base: acc1 ")
    assert "over 100 images, chance is 25 %" in str(found)
    assert (found.images, found.changed) == (100, gained + lost)


def test_a_handful_of_answers_is_no_verdict() -> None:
    """Five answers that all change one way are chance in one of sixteen runs, whatever a bootstrap says."""
    few = FEWEST_CHANGED - 1
    found = verdict([0] * few, [1] * few)
    assert found.difference.low > 0
    assert found.word == "no better"
    assert f"answers changed for {few} of {few} images" in str(found)
    assert verdict([0] * (few + 1), [1] * (few + 1)).word == "better"


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        ({"losses": (2.0, 1.99)}, ["`lr=0.003` or more `epochs`: the loss hardly fell"]),
        ({"roles": TEXT}, ["`targets=linear-text`"]),
        ({"roles": TEXT | {("text", "fc1")}}, ["`targets=linear`: both towers"]),
        ({"roles": {("vision", "q")}}, ["`targets=linear-vision`"]),
        ({"roles": {("vision", "fc1"), ("text", "fc1")}}, []),
        ({"rows": 525}, ["more than 525 pairs"]),
        ({}, []),
    ],
)
def test_advice_fits_the_run(run: dict[str, Any], advice: list[str]) -> None:
    """A user who is told to do what was done already loses an evening."""
    found = verdict([1, 0] * 50, [1, 0] * 50, **run).advice
    assert len(found) == len(advice)
    assert all(told.startswith(wanted) for told, wanted in zip(found, advice, strict=True))


def test_a_run_that_went_on_too_long_says_so() -> None:
    """The best of 32 epochs was the third: that is the first thing to know."""
    run = Trained(10_000, "pairs", 32, 1e-3, None, (2.0, 0.1), lost=0.03)
    found = judge(measured([0] * 50), measured([1] * 50), than="the base", epoch=3, trained=run)
    assert found.advice == ("`epochs=3`, or `lr=0.0003`: it was best after epoch 3 of 32",)


def test_it_turns_into_plain_values() -> None:
    """results.json is written from it."""
    plain = verdict([0] * 30, [1] * 30).to_dict()
    assert plain["word"] == "better"
    assert plain["by_metric"]["acc1"] == {"value": 1.0, "low": 1.0, "high": 1.0, "level": 0.95}
