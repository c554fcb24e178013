"""From a process that torchrun started to one of the `World` of a run, and back."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from clipgraft.errors import ConfigError
from clipgraft.train.heartbeat import End, Heartbeat, ProcessLostError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from clipgraft.train.distributed import World


_MEET = timedelta(minutes=5)
# The beats tell a dead process; a live one may take as long as an evaluation at rank 0 takes.
_LONGEST_WAIT = timedelta(hours=24)


@dataclass(frozen=True)
class Place:
    """What torchrun says of a process in its environment."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int
    hosted: bool
    attempt: str


@contextlib.contextmanager
def joined(end: End | None = None) -> Iterator[World]:
    """Meet the other processes of the run, for a `with` block that all of them run.

    Under torchrun, or any launcher that sets its variables; else this process is alone, at no cost. When one
    process ends with an exception the others do so as well, within 30 seconds: the first one with its own
    exception, the others with a SystemExit of the same code, and so without a message.

    `end` is what ends a process that hangs in a collective for all that: by default its main thread is
    interrupted; a command, whose process nothing else uses, exits at once.

    Raises:
        ConfigError: variables that are no numbers.
        ProcessLostError: a process did not come, or was killed.
    """
    from clipgraft.train.distributed import ALONE, World

    if not several():
        yield ALONE
        return
    place = _read(os.environ)
    store, heartbeat = _connect(place), Heartbeat(_connect(place, second=True), place.rank, place.size, end)
    _meet(store, place)
    own_group = _start_group(store, place)
    heartbeat.start()
    try:
        with _told_to_stop(heartbeat):
            world = World(place.rank, place.size, place.local_rank, heartbeat)
            yield world
            world.barrier()
    except SystemExit:
        heartbeat.stop()
        raise
    except BaseException as error:
        code = heartbeat.claim(int(getattr(error, "exit_code", 1)))
        if code is None:
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends when the first process ends
        time.sleep(1)  # and that one may still be writing
        raise SystemExit(code) from None
    heartbeat.stop()
    if own_group:
        import torch.distributed as dist

        dist.destroy_process_group()


def _read(environment: Mapping[str, str]) -> Place:
    try:
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT are to be numbers ({error}): start with torchrun, "
            "which sets them, or unset WORLD_SIZE"
        ) from error
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    attempt = "/".join(environment.get(name, "0") for name in names)
    return Place(rank, size, local_rank, environment["MASTER_ADDR"], port, hosted, attempt)


def _connect(place: Place, second: bool = False) -> Store:
    """A connection to the store where the processes meet: torchrun's, else the first one of rank 0."""
    import torch.distributed as dist

    master = place.rank == 0 and not place.hosted and not second
    store = dist.TCPStore(  # type: ignore[attr-defined]
        place.host, place.port, is_master=master, timeout=_MEET, wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore(f"clipgraft/{place.attempt}", store)  # type: ignore[attr-defined]


def _meet(store: Store, place: Place) -> None:
    here = [f"here/{rank}" for rank in range(place.size)]
    store.set(here[place.rank], "yes")
    try:
        store.wait(here, _MEET)
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(here) if not store.check([key])]
        raise ProcessLostError(
            f"rank {', '.join(missing)} of {place.size} did not come within {_MEET.seconds} s: start all "
            "with torchrun, or unset WORLD_SIZE to train in one process"
        ) from error


def _start_group(store: Store, place: Place) -> bool:
    """The group that tensors are sent in; False if the caller had one."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return False
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.size,
        timeout=_LONGEST_WAIT,
    )
    return True


@contextlib.contextmanager
def _told_to_stop(heartbeat: Heartbeat) -> Iterator[None]:
    """torchrun ends all processes when one has died: SIGTERM is then a reason to find out which one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(kind: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise heartbeat.find() or KeyboardInterrupt("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or another launcher that sets its variables, started more processes than this one."""
    return all(environment.get(name) for name in _VARIABLES) and environment["WORLD_SIZE"] != "1"
