"""One web process of a server: it answers HTTP, watches its model, and comes to an orderly end.

The first SIGTERM or SIGINT drains: no new connections, `/ready` says no, and requests under way have
`drain_seconds` to end, after which they are answered with 503. The second one ends all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from clipgraft.processes import REQUESTS
from clipgraft.serve.args import WebArgs
from clipgraft.serve.listening import leave
from clipgraft.serve.messages import Describe, Description, Encode, Text
from clipgraft.serve.metrics import Metrics
from clipgraft.serve.worker import Worker
from clipgraft.serve.worker_process import MakeService

if TYPE_CHECKING:
    from clipgraft.serve.http_server import HttpServer

log = logging.getLogger("clipgraft.serve")
Told: TypeAlias = Callable[[Description], None]
_LOOK = 0.5  # seconds between two looks at a model's state
_FAREWELL = 5.0  # seconds in which a server whose model failed says so, before it ends
_INTERRUPTED = 128  # what shells add to the number of the signal that ended a program


@dataclass(frozen=True)
class Launch:
    """What the web processes of a server share.

    Attributes:
        make_service: builds the service, in a process of its own; of one that has a method
            `numbered(process)`, each web process takes what that gives.
        web: the server's options.
        process: the number of this web process.
        shared: the folder for figures of all of them; None for one alone.
        output: where lines of processes go that are started here; pickle must be able to send it.
    """

    make_service: MakeService
    web: WebArgs
    process: int = 0
    shared: Path | None = None
    output: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def numbered(self, process: int) -> Launch:
        """What one of several web processes gets."""
        numbered = getattr(self.make_service, "numbered", None)
        recipe = self.make_service if numbered is None else numbered(process)
        return replace(self, process=process, make_service=recipe)

    @property
    def alone(self) -> bool:
        """Whether this is the only web process."""
        return self.shared is None


def _run(program: Coroutine[Any, Any, int]) -> int:
    """Run a program on the fastest event loop that is installed."""
    there = importlib.util.find_spec("uvloop") is not None
    code: int = importlib.import_module("uvloop" if there else "asyncio").run(program)
    return code


def serve_one(launch: Launch, listening: socket.socket, told: Told) -> int:
    """Serve from this process until a signal; gives the exit code. Must run in the main thread.

    Args:
        launch: what is served.
        listening: as `clipgraft.serve.listening.listen` opens it.
        told: called with what is served once a real message was answered.

    Raises:
        ClipgraftError: the model cannot be loaded, or was lost again and again.
    """
    return _run(_Server(launch, listening).serve(told))


class _Server:
    """A web process with its model."""

    def __init__(self, launch: Launch, listening: socket.socket) -> None:
        self._launch = launch
        self._listening = listening
        self._worker = Worker(launch.make_service)
        self._http: HttpServer | None = None
        self._stopping = False

    async def serve(self, told: Told) -> int:
        """Serve until a signal, or until the model cannot be loaded."""
        self._listen_to_signals()
        self._worker.start()
        try:
            http = self._http = await asyncio.to_thread(self._build)
            http.should_exit = self._stopping
            await self._run(http, told)
        finally:
            await self._worker.close()
        return 0

    def _build(self) -> HttpServer:
        from clipgraft.serve.http_server import http_server

        launch = self._launch
        return http_server(lambda: self._worker, launch.web, Metrics(launch.process, launch.shared))

    async def _run(self, http: HttpServer, told: Told) -> None:
        serving = asyncio.create_task(http.serve([self._listening]))
        beginning = asyncio.create_task(self._begin(http, told))
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait((serving, beginning), return_when=asyncio.FIRST_COMPLETED)
            if beginning.done() and beginning.exception() is not None:
                self._end()
            await serving
        finally:
            for task in (beginning, watching):
                task.cancel()
            ended = await asyncio.gather(beginning, watching, return_exceptions=True)
        if isinstance(ended[0], Exception):
            raise ended[0]
        if self._worker.state == "failed":
            await self._worker.ready()  # raises the reason

    async def _begin(self, http: HttpServer, told: Told) -> None:
        """Wait for the model, and tell once a real message has come back."""
        while not http.started:
            await asyncio.sleep(0.01)
        await self._worker.ready()
        if self._stopping:
            return
        described = await self._worker.answer(Describe())
        if "text" in described.towers:
            await self._worker.answer(Encode((Text("ready"),)))
        told(described)

    async def _watch(self) -> None:
        """End this process once its model is lost for good: whoever keeps it running starts it anew."""
        while self._worker.state != "failed":
            await asyncio.sleep(_LOOK)
        if self._launch.alone:
            await asyncio.sleep(_FAREWELL)
        self._end()

    def _end(self) -> None:
        """Take no more connections, and end when those that are there have ended."""
        self._stopping = True
        if self._http is not None:
            self._http.should_exit = True

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for kind in REQUESTS:
            if hasattr(signal, "pthread_sigmask"):
                loop.add_signal_handler(kind, self._stop, kind)
            else:
                signal.signal(kind, lambda kind, _: loop.call_soon_threadsafe(self._stop, kind))

    def _stop(self, kind: int) -> None:
        """Drain on the first signal; end at once on the second."""
        if self._stopping:
            log.warning("ended at once by a second signal")
            end_at_once(kind, self._launch)
        seconds = self._launch.web.drain_seconds
        waiting = self._worker.in_flight
        under_way = f"{waiting} requests under way have {seconds:g} s" if waiting else "nothing is under way"
        log.info("stopping: %s; a second signal ends it at once", under_way)
        self._worker.drain()
        self._end()
        asyncio.get_running_loop().call_later(seconds, self._worker.abandon, "the server is stopping")


def end_at_once(kind: int, launch: Launch) -> None:
    """End this process now, and with it those that it started."""
    leave(launch.web)
    logging.shutdown()
    os._exit(_INTERRUPTED + kind)
