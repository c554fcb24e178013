"""Ctrl-C and SIGTERM: the run saves itself between two steps and goes on later."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train.feed import Feed
from clipgraft.train.loop import Interrupted, stop_requests
from clipgraft.train.recipes import contrastive
from clipgraft.train.run_folder import RunFolder
from fitting import groups

Run = Callable[..., Any]


@pytest.fixture
def run(make_clip: Callable[[], Clip], pairs: cg.Pairs, tmp_path: Path) -> Run:
    """Two epochs of three steps."""

    def train(**options: Any) -> Any:
        clip = make_clip()
        cg.apply_lora(clip, r=2)
        settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "workers": 0, "progress": False, **options}
        return cg.fit(clip, pairs, pairs, **groups(out=tmp_path / "run", **settings))

    return train


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, kind: signal.Signals, event: str = "train") -> None:
    """Send this process a real signal when an event of the given step has been reported."""
    report = RunFolder.event

    def reporting(self: RunFolder, name: str, number: int, values: Any) -> None:
        report(self, name, number, values)
        if (name, number) == (event, step):
            os.kill(os.getpid(), kind)

    monkeypatch.setattr(RunFolder, "event", reporting)


def once(batches: Run) -> Run:
    """`Feed.batches` that fails if the first epoch is trained again."""

    def checked(self: Feed, epoch: int, start: int) -> Any:
        assert (epoch, start) in ((0, 3), (1, 0))
        return batches(self, epoch, start)

    return checked


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step(
    kind: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C would lose everything since the last epoch."""
    with monkeypatch.context() as patch:
        signal_at(patch, 2, kind)
        with pytest.raises(Interrupted, match="stopped and saved after step 2 of 6"):
            run()
    assert "stopping after this step, then saving" in capfd.readouterr().err
    assert len(run(resume=True).history) == 2


def test_a_signal_during_validation_stops_before_the_next_epoch(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run asked to stop would go on for another step of minutes."""
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGINT, "val")
        with pytest.raises(Interrupted, match="after step 3 of 6"):
            run()
    assert [line["epoch"] for line in run(resume=True).history] == [1, 2]


def test_a_signal_at_the_last_step_leaves_the_evaluation_for_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a run does not want to wait for a long evaluation, nor to lose the last epoch."""
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT)
        with pytest.raises(Interrupted, match="after step 6 of 6"):
            run()
    assert [line["epoch"] for line in run(resume=True).history] == [1, 2]


def test_a_signal_in_the_last_evaluation_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run must not be reported as interrupted."""
    signal_at(monkeypatch, 6, signal.SIGINT, "val")
    assert len(run().history) == 2


def at_the_first_epoch(fail: Callable[[], None]) -> Callable[..., Any]:
    """An evaluation that measures the base, and fails after the first epoch."""
    real, calls = contrastive.measure_retrieval, count()

    def measure(*args: Any) -> Any:
        if next(calls) > 0:
            fail()
        return real(*args)

    return measure


def test_a_failed_evaluation_costs_no_epoch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable validation image after hours of training would lose them."""

    def failing() -> None:
        raise cg.errors.DataError("an image has gone")

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "measure_retrieval", at_the_first_epoch(failing))
        with pytest.raises(cg.errors.DataError):
            run()
    monkeypatch.setattr(Feed, "batches", once(Feed.batches))
    assert len(run(resume=True).history) == 2


def test_an_evaluation_whose_workers_die_of_the_signal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler's SIGTERM reaches the loader of the validation images too."""

    def failing() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "measure_retrieval", at_the_first_epoch(failing))
        with pytest.raises(Interrupted, match="after step 3 of 6"):
            run()
    assert [line["epoch"] for line in run(resume=True).history] == [1, 2]


def test_workers_that_die_of_the_same_signal_are_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the loader's processes too; their end would hide that everything is saved."""

    def failing(self: Feed, epoch: int, start: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")
        yield

    monkeypatch.setattr(Feed, "batches", failing)
    with pytest.raises(Interrupted, match="after step 0 of 6"):
        run()


def test_the_second_signal_stops_at_once() -> None:
    """A step that hangs could not be stopped with the keyboard."""
    with stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_are_given_back(signalled: bool) -> None:
    """After training in a notebook, Ctrl-C would be swallowed."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = [signal.getsignal(kind) for kind in kinds]
    with stop_requests():
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_training_in_a_thread_needs_no_signals(run: Run) -> None:
    """Python allows signal handlers in the main thread only: `fit` in a server's thread would fail."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert len(results[0].history) == 2


def test_the_model_is_left_in_eval_mode(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, features after an interrupted run would have dropout in them."""
    cg.apply_lora(clip, r=2, dropout=0.5)
    signal_at(monkeypatch, 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", batch_size=8, epochs=1, workers=0, progress=False))
    assert not any(module.training for module in clip.model.modules())
