"""Who is gone, who says so, and when: the heartbeat that processes of a run keep on each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from clipgraft.cli import common
from clipgraft.cli.train import launcher
from clipgraft.errors import ConfigError
from clipgraft.train import heartbeat as heartbeat_module
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.heartbeat import Heartbeat, ProcessLostError
from clipgraft.train.launch import joined, several

UNDER_TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def heartbeats(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Heartbeat, Heartbeat]]:
    """Two processes' heartbeats over one store, in a hurry."""
    for name, seconds in (("BEAT", 0.01), ("SUSPECT", 0.2), ("SILENT", 60.0), ("GRACE", 60.0)):
        monkeypatch.setattr(heartbeat_module, name, seconds)
    store = dist.HashStore()
    both = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    for heartbeat in both:
        heartbeat.start()
    yield both
    for heartbeat in both:
        heartbeat.stop()


def test_a_silent_process_is_named(heartbeats: tuple[Heartbeat, Heartbeat]) -> None:
    """The user would not know which machine to look at."""
    ours, theirs = heartbeats
    theirs.stop()
    ours.advice = "go on"
    lost = ours.explain("connection closed")
    assert isinstance(lost, ProcessLostError)
    assert str(lost).startswith("rank 1 of 2 (")
    assert str(lost).endswith("; go on")


def test_nobody_is_named_while_all_live(heartbeats: tuple[Heartbeat, Heartbeat]) -> None:
    """Ctrl-C, or a broken cable, would be blamed on a process that is well."""
    assert heartbeats[0].find() is None
    assert "lost each other (connection closed)" in str(heartbeats[0].explain("connection closed\nat line 3"))


def test_a_process_that_hangs_is_ended_by_whoever_owns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library would end the program that uses it, or a command would wait for a dead process for ever."""
    for name, seconds in (("BEAT", 0.01), ("SILENT", 0.1), ("GRACE", 0.1)):
        monkeypatch.setattr(heartbeat_module, name, seconds)
    store, ended = dist.HashStore(), threading.Event()
    told: list[tuple[int, str | None]] = []
    theirs = Heartbeat(store, 1, 2)
    ours = Heartbeat(store, 0, 2, lambda code, line: (told.append((code, line)), ended.set())[0])
    ours.start()
    assert ended.wait(20)
    ((code, line),) = told
    assert (code, theirs is not ours) == (1, True)
    assert line is not None
    assert line.startswith("rank 1 of 2 (")


def test_the_first_to_end_the_run_is_believed(heartbeats: tuple[Heartbeat, Heartbeat]) -> None:
    """Each process would print an error: one the reason, the others what followed from it."""
    ours, theirs = heartbeats
    assert theirs.claim(2) is None
    assert ours.claim(1) == 2
    assert str(ours.explain("connection closed")).startswith("rank 1 of 2 has ended the run")


def test_who_is_one_of_several() -> None:
    """A shell in which one variable is left over would make every run wait for others."""
    assert several(UNDER_TORCHRUN)
    assert not several({**UNDER_TORCHRUN, "WORLD_SIZE": "1"})
    assert not several({"WORLD_SIZE": "2"})
    with joined() as world:
        assert world is ALONE


def test_variables_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in a job script would end in a traceback."""
    for name, value in {**UNDER_TORCHRUN, "RANK": "one"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="start with torchrun"), joined():
        pass


def test_the_command_to_go_on_with() -> None:
    """A run of two processes would be resumed in one."""
    assert launcher({}) == "clipgraft"
    assert launcher(UNDER_TORCHRUN) == "torchrun --nproc-per-node 2 -m -- clipgraft"
    assert "[its flags as before]" in launcher({**UNDER_TORCHRUN, "LOCAL_WORLD_SIZE": "1"})


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes would crowd onto the first GPU, and the others stand idle."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert common.own_device("auto", World(3, 4, 1)) == "cuda:1"
    assert chosen == [1]
    assert common.own_device("cpu", World(3, 4, 1)) == "cpu"
    assert common.own_device("cuda:1", ALONE) == "cuda:1"
    with pytest.raises(ConfigError, match="torch sees 2 GPUs here: start one process for each"):
        common.own_device("auto", World(2, 4, 2))
    with pytest.raises(ConfigError, match="use --device auto, or cpu"):
        common.own_device("cuda:0", World(1, 4, 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert common.own_device("auto", World(1, 4, 1)) == "auto"
