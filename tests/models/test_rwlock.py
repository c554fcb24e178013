"""Threads that load, switch, look and encode on one model do not meet."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.rwlock import RWLock


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Let threads change all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*tasks: Callable[[], object]) -> list[BaseException]:
    """What went wrong in tasks that ran side by side."""
    wrong: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return wrong


@pytest.mark.parametrize("others", [True, False])
def test_threads_may_load_unload_and_look_at_once(tiny_hf: nn.Module, tmp_path: Path, others: bool) -> None:
    """A server that loads two adapters at once would fail with "dictionary changed size during iteration".

    Without another adapter on the model the first and the last of them graft and restore the model itself.
    """
    cg.apply_lora(tiny_hf, r=2, targets="linear")
    saved = cg.save_adapter(tiny_hf, tmp_path / "a")
    if not others:
        cg.remove_lora(tiny_hf)
    clip = as_clip(tiny_hf)
    pixels = torch.zeros(1, 3, *[clip.model.config.vision_config.image_size] * 2)  # type: ignore[union-attr, operator]
    known, sites, base = clip.fingerprint, clip.sites, clip.dtype

    def load(number: int) -> Callable[[], None]:
        def task() -> None:
            for turn in range(6):
                name = f"t{number}-{turn}"
                cg.load_adapter(clip, saved, name=name, activate=False)
                cg.remove_lora(clip, name)

        return task

    def look() -> None:
        for _ in range(12):
            assert (clip.fingerprint, clip.sites, clip.dtype) == (known, sites, base)
            clip.encode_image(pixels)

    assert in_threads(*(load(number) for number in range(4)), look, look) == []


def test_who_is_inside_may_enter_again() -> None:
    """Encoding asks for the model's type while a loader waits: both would wait for ever."""
    lock, inside, go_on = RWLock(), threading.Event(), threading.Event()

    def compute() -> None:
        with lock.read():
            inside.set()
            go_on.wait(60)
            with lock.read():
                pass

    def load() -> None:
        inside.wait(60)
        with lock.preparing(), lock.read():
            pass
        with lock.write(), lock.write(), lock.read():
            pass

    def let_go() -> None:
        inside.wait(60)
        while not lock._waiting:
            pass
        go_on.set()

    assert in_threads(compute, load, let_go) == []


def test_a_copy_of_a_model_has_a_lock_of_its_own() -> None:
    """Locks cannot be copied, and who is inside the original is not inside the copy."""
    lock = RWLock()
    with lock.write():
        other = copy.deepcopy(lock)
        assert in_threads(lambda: other.write().__enter__()) == []
