"""The model's side of `clipgraft.serve.worker`: a process that builds a service and answers frames."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

from clipgraft.errors import ClipgraftError
from clipgraft.processes import REQUESTS, die_with_parent, leave_terminal, let_signals_in
from clipgraft.serve.messages import Backend, State, Stats
from clipgraft.serve.pipe import Frame, Kind, Pipe, packed, packed_error

log = logging.getLogger("clipgraft.serve")
MakeService: TypeAlias = Callable[[], Backend]
"""Builds the service, in its own process: a function of a module, or a value that pickle can send.

Of one that has a method `computed_by`, that is asked for a recipe whose service computes in the main thread.
"""
BEAT = 0.5
"""Seconds between two signs of life."""
_LOOK = 0.01  # seconds between two looks at a service that is about to be ready
_PATIENCE = 2.0  # seconds that counting may take before a beat goes out without it


def run(end: socket.socket, recipe: bytes) -> None:
    """Build the service of a pickled `MakeService`, and answer frames until the parent is done or gone."""
    leave_terminal()
    for kind in REQUESTS:  # systemd sends SIGTERM to all; the parent says when to end
        signal.signal(kind, signal.SIG_IGN)
    let_signals_in()
    die_with_parent()
    main = MainThread()
    threading.Thread(target=_serve, args=(end, recipe, main), name="clipgraft-process").start()
    main.run()


class MainThread:
    """Lends the main thread to the loop that computes (`clipgraft.serve.computing`)."""

    def __init__(self) -> None:
        self._loops: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()

    def begin(self, loop: Callable[[], None]) -> Callable[[], object]:
        """Run a loop in the main thread, after those begun before; what is returned waits for its end."""
        ended = threading.Event()
        self._loops.put((loop, ended))
        return ended.wait

    def run(self) -> None:
        """Run loops, until the process ends."""
        while True:
            loop, ended = self._loops.get()
            try:
                loop()
            finally:
                ended.set()


def _serve(end: socket.socket, recipe: bytes, main: MainThread) -> None:
    """Build the service and answer frames; ends the process."""
    gc.disable()  # it finds nothing while modules are imported, which it makes a fifth slower
    try:
        make_service = pickle.loads(recipe)
        computed_by = getattr(make_service, "computed_by", None)
        service = (make_service if computed_by is None else computed_by(main.begin))()
    except Exception as error:
        if not isinstance(error, ClipgraftError | OSError):
            traceback.print_exc()
        end.setblocking(True)
        with contextlib.suppress(OSError):
            end.sendall(packed_error(Kind.UNUSABLE, 0, error))
        os._exit(1)  # without waiting for threads that were begun
    gc.freeze()  # modules and weights stay; looking through them would stop all requests for half a second
    gc.enable()
    try:
        asyncio.run(_Process(service).attend(end))
    except BaseException:  # the main thread would wait for ever
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class _Process:
    """Answers the frames that come in."""

    def __init__(self, service: Backend) -> None:
        self._service = service
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._progress = 0

    async def attend(self, end: socket.socket) -> None:
        """Answer until the other side says close, or is gone."""
        pipe = await Pipe.over(end)
        beating = asyncio.create_task(self._beat(pipe))
        async for frame in pipe.frames():
            if frame.kind == Kind.CLOSE:
                break
            if frame.kind == Kind.ASK:
                task = asyncio.create_task(self._answer(pipe, frame))
                self._tasks[frame.number] = task
                task.add_done_callback(lambda _, number=frame.number: self._tasks.pop(number))  # type: ignore[misc]
            elif frame.kind == Kind.CANCEL and (asked := self._tasks.get(frame.number)) is not None:
                asked.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._service.close()
        beating.cancel()

    async def _answer(self, pipe: Pipe, frame: Frame) -> None:
        message, timeout = frame.value
        try:
            answer = await self._service.answer(message, timeout=timeout)
            reply = packed(Kind.ANSWER, frame.number, answer)
        except Exception as error:
            if not isinstance(error, ClipgraftError):
                log.exception("a %s failed", type(message).__name__)
            reply = packed_error(Kind.ERROR, frame.number, error)
        with contextlib.suppress(OSError):
            await pipe.send(reply)

    async def _beat(self, pipe: Pipe) -> None:
        """Tell the state and how much was done, often until the service is ready."""
        told: State | None = None
        while True:
            state = self._service.state
            if state != told or state != "starting":
                await self._count()
                pipe.send_soon(packed(Kind.BEAT, 0, (state, self._progress)))
                told = state
            await asyncio.sleep(_LOOK if state == "starting" else BEAT)

    async def _count(self) -> None:
        """Add up what the service has counted: while that grows, a long batch is no hang."""
        with contextlib.suppress(Exception):
            found = await asyncio.wait_for(self._service.answer(Stats()), _PATIENCE)
            self._progress = sum(found.counts.values())
