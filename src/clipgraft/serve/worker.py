"""A backend whose model lives in a process of its own, which is watched and started again when it is lost.

The web process imports no torch, and what kills a model (a segmentation fault, a system short of memory)
leaves it answering: requests under way get an `UnavailableError` at once, and those that come until the model
is back are told when that will be.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import TypeVar

from clipgraft.errors import ClipgraftError, ClusterError, UnavailableError
from clipgraft.processes import process_name, start_unsignalled, told_end
from clipgraft.serve.messages import Message, State
from clipgraft.serve.pipe import Frame, Kind, Pipe, packed
from clipgraft.serve.worker_process import MakeService, run
from clipgraft.shown import one_line

log = logging.getLogger("clipgraft.serve")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Supervision:
    """How a model's process is watched.

    Attributes:
        silent: seconds without a sign of life, while something is asked, after which it counts as hung. It
            gives one every half second while a batch is computed, as torch computes without Python's lock.
        stuck: seconds without an answer or any progress, while something is asked and signs of life come,
            after which it counts as hung. The largest batch takes a fraction of that on a slow machine.
        most_quick: it is given up after so many ends in a row, each before it had answered anything.
        first_pause, longest_pause: seconds before it is started again, doubled with each quick end.
        close: seconds that it has to end by itself.
        grace: seconds beyond a message's timeout that its answer may take to come through.
    """

    silent: float = 30.0
    stuck: float = 300.0
    most_quick: int = 5
    first_pause: float = 0.1
    longest_pause: float = 10.0
    close: float = 10.0
    grace: float = 1.0

    def pause(self, quick: int) -> float:
        """Seconds to wait before a start, after so many quick ends in a row."""
        return min(self.longest_pause, self.first_pause * 2.0 ** max(0, quick - 1))


class _Child:
    """One process with a model, from its start to its end."""

    def __init__(self, process: BaseProcess, pipe: Pipe) -> None:
        self.process = process
        self.pipe = pipe
        self.pending: dict[int, asyncio.Future[object]] = {}
        self.state: State = "starting"
        self.answered = 0
        self.unusable: Exception | None = None
        self.silence = 0.0
        self.standstill = 0.0
        self._progress = 0

    @classmethod
    async def start(cls, recipe: bytes) -> _Child:
        """Start a process that builds the service of a recipe."""
        ours, theirs = socket.socketpair()
        process = multiprocessing.get_context("spawn").Process(
            target=run, args=(theirs, recipe), name=process_name("model")
        )
        with theirs:
            await asyncio.to_thread(start_unsignalled, process)
        atexit.register(process.kill)  # before multiprocessing waits for it
        return cls(process, await Pipe.over(ours))

    def take(self, frame: Frame) -> None:
        """Take in a frame: an answer, or a sign of life."""
        self.silence = 0.0
        if frame.kind == Kind.BEAT:
            self.state, progress = frame.value
            if progress != self._progress:
                self._progress, self.standstill = progress, 0.0
            return
        if frame.kind == Kind.UNUSABLE:
            self.unusable = frame.value
            return
        self.standstill = 0.0
        self.answered += 1
        waiting = self.pending.pop(frame.number, None)
        if waiting is None or waiting.done():
            return
        if frame.kind == Kind.ERROR:
            waiting.set_exception(frame.value)
        else:
            waiting.set_result(frame.value)

    def wait(self, seconds: float) -> None:
        """Note that so much time has gone by; while nothing is asked, that means nothing."""
        if self.pending:
            self.silence += seconds
            self.standstill += seconds
        else:
            self.silence = self.standstill = 0.0

    def fail(self, error: ClipgraftError) -> None:
        """Answer everything that is under way with an error."""
        for waiting in self.pending.values():
            if not waiting.done():
                waiting.set_exception(error)
        self.pending.clear()

    async def end(self) -> None:
        """Kill the process, unless it has ended."""
        if self.process.exitcode is None:
            self.process.kill()
            await asyncio.to_thread(self.process.join)
        self.pipe.close()
        atexit.unregister(self.process.kill)


@dataclass
class _Record:
    """What is remembered of processes that have ended."""

    quick: int = 0
    restarts: int = 0
    seconds: float = 5.0  # that the last start took; until one has been seen, a guess
    back_at: float = field(default_factory=lambda: time.monotonic() + 5.0)


class Worker:
    """Answers messages from a process of its own; start it in the event loop that asks it.

    Attributes:
        reason: why it failed for good, or was last lost, in one line; empty while all is well.
    """

    def __init__(
        self,
        make_service: MakeService,
        supervision: Supervision | None = None,
        told: Callable[[State], None] = lambda _: None,
    ) -> None:
        """Prepare to start; nothing runs yet.

        Args:
            make_service: builds the service in the process; pickle must be able to send it.
            supervision: how the process is watched.
            told: called with each new state.

        Raises:
            ConfigError: `make_service` cannot be sent.
        """
        self.reason = ""
        self._recipe = pickle.dumps(make_service)
        self._rules = supervision or Supervision()
        self._told = told
        self._state: State = "starting"
        self._child: _Child | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._record = _Record()
        self._number = 0
        self._closing = False
        self._failure: Exception | None = None

    @property
    def state(self) -> State:
        """`ready` while the process answers; `draining` once `drain` was called, whatever it does."""
        return self._state

    @property
    def restarts(self) -> int:
        """How often a process was started in place of a lost one."""
        return self._record.restarts

    @property
    def in_flight(self) -> int:
        """How many messages wait for an answer."""
        return len(self._child.pending) if self._child is not None else 0

    @property
    def pid(self) -> int | None:
        """The number of the model's process, while there is one."""
        return self._child.process.pid if self._child is not None else None

    def start(self) -> Worker:
        """Start the process; gives this worker, whose state tells when it is ready."""
        if self._supervising is None:
            self._supervising = asyncio.create_task(self._supervise())
        return self

    async def ready(self) -> None:
        """Wait until messages are answered.

        Raises:
            ClipgraftError: what the service raised when it was built, or that its process ended each time.
        """
        while self._state not in ("ready", "failed", "draining"):
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    async def answer(self, message: Message[Answer], *, timeout: float | None = None) -> Answer:
        """See `Backend.answer`."""
        child = self._child
        if child is None or child.state != "ready" or self._closing:
            raise self._unavailable()
        self._number = number = self._number + 1
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        child.pending[number] = waiting  # type: ignore[assignment]
        try:
            await child.pipe.send(packed(Kind.ASK, number, (message, timeout)))
            if timeout is None:
                return await waiting
            return await asyncio.wait_for(waiting, timeout + self._rules.grace)
        except (asyncio.TimeoutError, TimeoutError):  # which is an OSError from Python 3.11 on
            raise UnavailableError(f"there was no answer within {timeout:g} s") from None
        except OSError:
            raise self._unavailable() from None
        finally:
            if child.pending.pop(number, None) is not None:
                child.pipe.send_soon(packed(Kind.CANCEL, number))
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # seen: the process may be lost while a send waits

    def drain(self) -> None:
        """Say `draining` from now on; what is asked is answered until `close`."""
        self._enter("draining")

    def abandon(self, reason: str, retry_after: float = 5.0) -> None:
        """Answer everything that is under way with an `UnavailableError`, and accept nothing more."""
        self._closing = True
        self._enter("draining")
        if self._child is not None:
            for number in self._child.pending:
                self._child.pipe.send_soon(packed(Kind.CANCEL, number))
            self._child.fail(UnavailableError(reason, retry_after))

    async def close(self) -> None:
        """See `Backend.close`."""
        self._closing = True
        self._enter("draining")
        child = self._child
        if child is not None and child.state == "ready":
            if child.pending:
                await asyncio.wait(list(child.pending.values()))
            child.pipe.send_soon(packed(Kind.CLOSE))
            if self._supervising is not None:
                await asyncio.wait([self._supervising], timeout=self._rules.close)
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)

    async def _supervise(self) -> None:
        """Start processes, one after another, until one is closed or they are given up."""
        record, rules = self._record, self._rules
        try:
            while True:
                child = self._child = await _Child.start(self._recipe)
                try:
                    reason = await self._attend(child)
                except asyncio.CancelledError:
                    child.process.kill()
                    raise
                finally:
                    self._lost(child)
                    await child.end()
                if self._closing:
                    return
                record.quick = 0 if child.answered else record.quick + 1
                first = not record.restarts and child.state == "starting"
                if record.quick >= rules.most_quick or (first and child.unusable is not None):
                    self._give_up(child, reason)
                    return
                pause = rules.pause(record.quick)
                record.restarts += 1
                record.back_at = time.monotonic() + pause + record.seconds
                self.reason = reason
                log.warning("the model's process %s; it is started again in %.1f s", reason, pause)
                self._enter("restarting")
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # such as no processes left
            log.exception("the model's process cannot be started")
            self._failure = ClusterError(f"the model's process cannot be started: {error}")
            self.reason = str(self._failure)
            self._enter("failed")

    async def _attend(self, child: _Child) -> str:
        """Take in what a process sends until it has ended; gives the reason in a few words."""
        begun = time.monotonic()
        watching = asyncio.create_task(self._watch(child))
        async for frame in child.pipe.frames():
            before = child.state
            child.take(frame)
            if child.state == before:
                continue
            if child.state == "ready":
                self._record.seconds = time.monotonic() - begun
                if self._record.restarts:
                    log.info("the model is ready again, after %.1f s", self._record.seconds)
                self._enter("ready")
            elif child.state == "failed":
                break
        was_ready = child.state == "ready"
        self._lost(child)
        if was_ready and not self._closing:
            self._enter("restarting")
        watching.cancel()
        found = (await asyncio.gather(watching, return_exceptions=True))[0]
        if isinstance(found, str):
            return found
        if child.state == "failed":
            child.process.kill()
            return "can compute no more, as its log says"
        await asyncio.to_thread(child.process.join, 1.0)
        told = f": {one_line(str(child.unusable))}" if child.unusable is not None else ""
        return f"{told_end(child.process.exitcode)}{told}"

    async def _watch(self, child: _Child) -> str:
        """Kill a process that hangs, and say so. Counted by ticks: a machine that slept proves nothing."""
        rules = self._rules
        tick = min(0.5, rules.silent / 4, rules.stuck / 4)
        while child.process.exitcode is None:
            await asyncio.sleep(tick)
            child.wait(tick)
            if child.silence > rules.silent or child.standstill > rules.stuck:
                what = "gave no sign of life" if child.silence > rules.silent else "made no progress"
                seconds = max(child.silence, child.standstill)
                child.process.kill()
                child.pipe.close()
                return f"{what} for {seconds:.0f} s and was killed"
        await asyncio.sleep(tick)  # what it sent is read first
        child.pipe.close()
        return told_end(child.process.exitcode)

    def _lost(self, child: _Child) -> None:
        """Answer what a process took with it."""
        retry = self._rules.pause(self._record.quick) + self._record.seconds
        child.fail(UnavailableError("the model was lost over this or another request", retry))
        if self._child is child:
            self._child = None

    def _give_up(self, child: _Child, reason: str) -> None:
        ended = self._record.quick
        if child.unusable is not None:
            self._failure = child.unusable
        else:
            self._failure = ClusterError(f"the model's process {reason}, {ended} times in a row")
        self.reason = one_line(str(self._failure))
        log.error("the model is given up: %s", self.reason)
        self._enter("failed")

    def _unavailable(self) -> UnavailableError:
        """Say why nothing is answered now, and when that is expected to end."""
        if self._closing:
            return UnavailableError("the server is stopping", 5.0)
        if self._state == "failed":
            return UnavailableError(f"the model failed: {self.reason}", 60.0)
        left = max(1.0, self._record.back_at - time.monotonic())
        doing = "restarting" if self._record.restarts or self._state == "restarting" else "starting"
        return UnavailableError(f"the model is {doing}", left)

    def _enter(self, state: State) -> None:
        if state == self._state or self._state == "failed":
            return
        if self._state == "draining" and state != "failed":
            return
        self._state = state
        self._changed.set()
        self._told(state)
