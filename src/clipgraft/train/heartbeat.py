"""A thread that tells the other processes of a run that this one lives, and notices when one does not.

Each process counts up a beat of its own in the store they all reach. A process that has been silent for too
long is dead, whatever the others wait for: a broken connection says that somebody is gone, the beats say who.
The first process that ends the run leaves a note of it there; it alone has something to tell the user.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from clipgraft.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 0.5
"""Seconds between two beats."""
SILENT = 20.0
"""Seconds of silence after which a process counts as dead. torchrun kills after 30."""
SUSPECT = 4.0
"""The same where something is known to be wrong already: a connection broke, or torchrun says stop."""
GRACE = 5.0
"""Seconds that a process has to end by itself when another one has ended the run."""
_NOTHING = "-"
End: TypeAlias = Callable[[int, "str | None"], None]
"""What ends a process that hangs, given its exit code and what to say, if no other process has said it."""


class ProcessLostError(TrainingError):
    """Another process of the run has ended, on its own or by force."""


class Heartbeat:
    """What one process knows of the others. `store` must be for its use alone.

    Attributes:
        advice: what the user is told to do when a process is lost.
    """

    def __init__(self, store: Store, rank: int, size: int, end: End | None = None) -> None:
        """`end` is called, in another thread, where this process hangs in spite of all."""
        self._end_process = end or _interrupt
        self.advice = "start the run again, and let it go on from its last checkpoint"
        self._store, self._rank, self._size = store, rank, size
        self._places: list[str] = []
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._ended = _NOTHING
        self._unreachable = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        store.set(f"place/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        store.set(f"beat/{rank}", "0")
        store.compare_set("ended", "", _NOTHING)

    def start(self) -> None:
        """Begin; every process must have made its heartbeat before."""
        self._places = [place.decode() for place in self._store.multi_get(_keys("place", range(self._size)))]
        self._thread.start()

    def stop(self) -> None:
        """The run is over, and silence means nothing any more."""
        self._over.set()
        self._thread.join(GRACE)

    def claim(self, code: int) -> int | None:
        """Note that this process ends the run with an exit code; None if it is the first to do so.

        Else the code of the one that was: its message is enough.
        """
        mine = f"{self._rank} {code}"
        try:
            first = self._store.compare_set("ended", _NOTHING, mine).decode()
        except RuntimeError:  # the store is gone, and with it whoever could have been first
            return None
        return None if first == mine else int(first.split()[1])

    def explain(self, cause: object) -> ProcessLostError:
        """Why a process does not answer, as soon as that is known."""
        found = self.find()
        return found or self._lost(f"the processes lost each other ({_first_line(cause)})")

    def find(self) -> ProcessLostError | None:
        """Wait for what is wrong with another process to show; None if nothing is."""
        deadline = time.monotonic() + 2 * SUSPECT
        while (reason := self._reason(SUSPECT)) is None and time.monotonic() < deadline:
            time.sleep(BEAT / 5)
        return None if reason is None else self._lost(reason)

    def _lost(self, reason: str) -> ProcessLostError:
        return ProcessLostError(f"{reason}; {self.advice}")

    def _run(self) -> None:
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            try:
                self._beat(number)
            except RuntimeError:
                self._unreachable = True
            if self._reason(SILENT):
                break
        if not self._over.wait(GRACE):
            self._end()

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", str(number))
        others = [rank for rank in range(self._size) if rank != self._rank]
        *beats, ended = self._store.multi_get([*_keys("beat", others), "ended"])
        now = time.monotonic()
        for rank, beat in zip(others, beats, strict=True):
            if self._heard.get(rank, (b"", 0.0))[0] != beat:
                self._heard[rank] = beat, now
        self._ended = ended.decode()

    def _reason(self, patience: float) -> str | None:
        """What is wrong, in words; None as long as nothing is."""
        if self._ended != _NOTHING:
            return f"rank {self._ended.split()[0]} of {self._size} has ended the run"
        if self._unreachable:
            return "torchrun, or rank 0 where there is no torchrun, is gone"
        now = time.monotonic()
        silent = [rank for rank, (_, since) in self._heard.items() if now - since > patience]
        if not silent:
            return None
        rank = silent[0]
        what = "perhaps it was killed for want of memory"
        return f"rank {rank} of {self._size} ({self._places[rank]}) has died, or hangs: {what}"

    def _end(self) -> None:
        """End this process, which waits for one that is gone."""
        reason, mine = self._reason(SILENT), self._ended.startswith(f"{self._rank} ")
        code = self.claim(1)
        told = f"{reason}; {self.advice}" if code is None and not mine else None
        self._end_process(1 if code is None else code, told)


def _interrupt(code: int, told: str | None) -> None:
    """End what the main thread waits for: collectives on a GPU are aborted, all else hears SIGTERM.

    A command, whose process nothing else uses, gives `joined` an `end` that exits at once.
    """
    import torch.distributed.distributed_c10d as c10d

    with contextlib.suppress(RuntimeError, AttributeError, ValueError):
        c10d._abort_process_group()  # which gloo lacks: it hears of a closed connection by itself
    _thread.interrupt_main(signal.SIGTERM)


def _keys(name: str, ranks: Iterable[int]) -> list[str]:
    return [f"{name}/{rank}" for rank in ranks]


def _first_line(cause: object) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0][:200]
