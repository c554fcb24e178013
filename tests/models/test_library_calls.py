"""Libraries kept quiet in one thread, and offline while a hub does not answer, beside other threads."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from transformers.utils import logging as hf_logging

from clipgraft.models import hub
from clipgraft.models.hub import hub_access
from clipgraft.models.library_calls import no_initialization, quiet_libraries, seeded

PATIENCE = 60


def in_thread(work: Callable[[], None]) -> None:
    """Run something in another thread, and raise here what it raises there."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(PATIENCE)


def test_log_lines_of_the_calling_thread_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Loading a model in one thread silences the errors of all others, or shows what open_clip logs."""

    def others() -> None:
        logging.error("of another thread")

    with caplog.at_level(logging.INFO), quiet_libraries():
        logging.error("of a library")
        hf_logging.get_logger("transformers.modeling_utils").error("of transformers")
        logging.getLogger("clipgraft").info("of ours")
        logging.critical("the disk is gone")
        in_thread(others)
    logging.error("after")
    assert caplog.messages == ["of ours", "the disk is gone", "of another thread", "after"]


def test_a_process_without_logging_gets_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`logging.warning`, which open_clip calls, sets up logging where nobody has, and writes a line."""
    monkeypatch.setattr(logging.root, "handlers", [])
    with quiet_libraries():
        logging.warning("no weights")
        in_thread(lambda: logging.warning("of another thread"))
    assert logging.root.handlers == []
    assert capsys.readouterr().err == "of another thread\n"


def test_warnings_of_the_calling_thread_are_dropped() -> None:
    """A warning in a library becomes an error under -W error, or other threads' warnings vanish."""

    def others() -> None:
        with pytest.raises(UserWarning, match="of another thread"):
            warnings.warn("of another thread", stacklevel=1)

    before = list(warnings.filters)
    with quiet_libraries():
        warnings.warn("of a library", stacklevel=1)
        in_thread(others)
        with quiet_libraries():
            pass
        warnings.warn("of a library again", stacklevel=1)
    with pytest.raises(UserWarning, match="after"):
        warnings.warn("after", stacklevel=1)
    assert list(warnings.filters) == before


def overlapping(context: Callable[[], object], looked_at: Callable[[], object]) -> list[object]:
    """What is seen before, with two threads inside, when the first has left, and when both have."""
    first_inside, second_inside, first_left = threading.Event(), threading.Event(), threading.Event()
    seen: list[object] = [looked_at()]

    def first() -> None:
        with context():  # type: ignore[attr-defined]
            first_inside.set()
            assert second_inside.wait(PATIENCE)
            seen.append(looked_at())
        seen.append(looked_at())
        first_left.set()

    def second() -> None:
        assert first_inside.wait(PATIENCE)
        with context():  # type: ignore[attr-defined]
            second_inside.set()
            assert first_left.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(PATIENCE)
    return [*seen, looked_at()]


def test_bars_come_back_with_the_last_thread() -> None:
    """The thread that leaves first shows bars to the other, or the last one leaves them off for good."""
    seen = overlapping(quiet_libraries, hf_logging.is_progress_bar_enabled)
    assert seen == [True, False, False, True]


def test_offline_mode_goes_with_the_last_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two loads ends the other's offline mode: each of its files is tried for half a minute."""
    asked: list[str] = []
    monkeypatch.setattr(hub, "_unreachable", lambda url: asked.append(url) or "no route")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    seen = overlapping(lambda: hub_access(True), huggingface_hub.is_offline_mode)
    assert seen == [False, True, True, False]
    assert len(asked) == 1


def test_a_second_thread_gives_the_first_ones_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody without a network is told of an environment variable that was never set."""
    monkeypatch.setattr(hub, "_unreachable", lambda url: "no route")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def others() -> None:
        with hub_access(True) as reason:
            assert "cannot be reached (no route)" in reason

    with hub_access(True):
        in_thread(others)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with hub_access(True) as reason:
        assert reason == "HF_HUB_OFFLINE is set"
    assert huggingface_hub.is_offline_mode()


def test_the_callers_generator_is_left_as_it_was() -> None:
    """Loading a model changes what a program with a seed draws next; two loads at once mix their draws."""
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with no_initialization():
        torch.nn.Linear(4, 4)
        torch.rand(5)

    def draw() -> torch.Tensor:
        with seeded(3):
            return torch.stack([torch.rand(1000) for _ in range(20)])

    with ThreadPoolExecutor(4) as pool:
        drawn = [made.result(PATIENCE) for made in [pool.submit(draw) for _ in range(8)]]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    assert torch.equal(torch.rand(3), wanted)
