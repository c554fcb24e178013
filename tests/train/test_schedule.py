"""A run that is given more epochs: the schedule of what is added, to the same bits however it came about."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train import loop
from clipgraft.train.args import TrainArgs
from clipgraft.train.schedule import schedule_of
from fitting import groups
from run_comparison import dies_at, differences, events, run_contents

Train = Callable[..., cg.train.FitResult]


@pytest.fixture
def train(make_clip: Callable[[], Clip], pairs: cg.Pairs) -> Train:
    """A text adapter with dropout; six steps an epoch, a checkpoint every four."""

    def run(out: Path, **options: Any) -> cg.train.FitResult:
        clip = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(clip, r=2, dropout=0.3)
        given = {"batch_size": 4, "lr": 1e-2, "checkpoint_steps": 4, "val_frequency": 0, **options}
        return cg.fit(clip, pairs, pairs, **groups(out=out, workers=0, progress=False, **given))

    return run


def assert_same(left: Path, right: Path) -> None:
    """Adapters, checkpoints with their settings, and events are the same to the last bit."""
    assert differences(run_contents(left), run_contents(right)) == []
    assert events(left) == events(right)


def test_an_extended_run_is_the_run_of_its_parts(train: Train, tmp_path: Path) -> None:
    """What comes of ten epochs and ten more depends on when somebody thought of them."""
    train(tmp_path / "extended", epochs=2)
    train(tmp_path / "extended", epochs=3, resume=True)
    whole = train(tmp_path / "whole", epoch_parts=(2, 1))
    assert_same(tmp_path / "extended", tmp_path / "whole")
    assert [row["epoch"] for row in whole.history] == [2, 3]


@pytest.mark.parametrize("call", range(1, 6))
def test_interrupted_anywhere(call: int, train: Train, tmp_path: Path) -> None:
    """A kill, before or after the first part ends, changes what comes of an extended run."""
    train(tmp_path / "whole", epoch_parts=(1, 2))
    run = tmp_path / "run"
    train(run, epochs=1)
    # The end of the first part is reached again, then six steps twice, with checkpoints between them.
    with dies_at(loop, "save_checkpoint", call, before=False):
        train(run, epochs=3, resume=True)
    train(run, epochs=3, resume=True)
    assert_same(run, tmp_path / "whole")


def test_extended_before_its_end(train: Train, tmp_path: Path) -> None:
    """A run that was stopped in its first part forgets that part when more epochs are asked for."""
    run = tmp_path / "run"
    with dies_at(loop, "save_checkpoint", 3, before=False):
        train(run, epochs=2)
    train(run, epochs=3, resume=True)
    train(tmp_path / "whole", epoch_parts=(2, 1))
    assert_same(run, tmp_path / "whole")


def test_a_constant_rate_knows_no_parts(train: Train, tmp_path: Path) -> None:
    """One epoch and two more are another run than three, though nothing in them depends on the end."""
    same = {"lr_scheduler": "const", "warmup": 0, "val_frequency": 1}
    train(tmp_path / "extended", epochs=1, **same)
    train(tmp_path / "extended", epochs=3, resume=True, **same)
    train(tmp_path / "whole", epochs=3, **same)
    left, right = run_contents(tmp_path / "extended"), run_contents(tmp_path / "whole")
    for found in (left, right):
        found["latest"]["settings"].pop("epoch_parts")
    assert differences(left, right) == []
    assert events(tmp_path / "extended") == events(tmp_path / "whole")


def test_the_learning_rate_of_an_added_part() -> None:
    """The added epochs train at a rate of zero, or warm up again."""
    spec = TrainArgs(epochs=30, epoch_parts=(20, 10), lr=1.0, warmup=10)
    lr = schedule_of(spec, steps_per_epoch=10)
    assert lr(0) == 0.1
    assert lr(10) == 1.0
    assert lr(199) < 1e-3
    assert lr(200) == 1.0
    assert lr(250) == pytest.approx(0.5)
    assert lr(299) < 1e-3
    cooldown = TrainArgs(
        epochs=6, epoch_parts=(3, 3), lr=1.0, warmup=0, lr_scheduler="const-cooldown", epochs_cooldown=1
    )
    lr = schedule_of(cooldown, steps_per_epoch=10)
    assert [lr(step) for step in (0, 19, 20, 25, 30, 49, 55)] == pytest.approx([1, 1, 1, 0.5, 1, 1, 0.5])


def test_the_epochs_of_a_resumed_run(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Default epochs extend a run that nobody wanted extended, or fewer epochs than done are a riddle."""
    run = tmp_path / "run"
    train(run, epochs=3)
    caplog.set_level("INFO", "clipgraft")
    train(run, resume=True)
    assert len([event for event in events(run) if event["kind"] == "train"]) == 18
    assert "more follow" not in caplog.text
    train(run, epochs=4, resume=True)
    assert (
        f"{run} was to have 3 epochs: 1 more follow, for which the learning rate starts at 0.01 again in "
        "epoch 4 and falls to 0 by a cosine" in caplog.text
    )
    with pytest.raises(
        cg.errors.CheckpointError, match=r"`epochs=2`: .* has done 4 epochs already; ask for 4 or more"
    ):
        train(run, epochs=2, resume=True)
    with pytest.raises(
        cg.errors.CheckpointError, match=re.escape("has epochs in parts of 3 + 1, and `epoch_parts`")
    ):
        train(run, epoch_parts=(4, 4), resume=True)
    other = tmp_path / "other"
    with dies_at(loop, "save_checkpoint", 3, before=False):
        train(other, epochs=3)
    with pytest.raises(cg.errors.CheckpointError, match=r"`epochs=2`: .* is under way to 3 epochs"):
        train(other, epochs=2, resume=True)
    with pytest.raises(
        cg.errors.ConfigError, match="`epoch_parts=1,1` sum to 2, but `epochs` is 3: drop one"
    ):
        train(tmp_path / "new", epoch_parts=(1, 1), epochs=3)
