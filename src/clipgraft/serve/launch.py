"""Start a server: one web process, or several that share a port, each with a model.

Several processes take connections from one socket, so that one that is busy leaves them to others; one that
ends is started again.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from clipgraft.errors import ClipgraftError
from clipgraft.processes import (
    REQUESTS,
    die_with_parent,
    leave_terminal,
    let_signals_in,
    process_name,
    start_unsignalled,
    told_end,
)
from clipgraft.serve.listening import leave
from clipgraft.serve.messages import Description
from clipgraft.serve.web_process import Launch, Told, end_at_once, serve_one
from clipgraft.serve.worker import Supervision

log = logging.getLogger("clipgraft.serve")
_PAUSES = Supervision(first_pause=0.2)


def serve(launch: Launch, listening: socket.socket, told: Told) -> int:
    """Serve until a signal, from `launch.web.workers` processes; gives the exit code.

    Must run in the main thread.

    Args:
        launch: what is served.
        listening: as `clipgraft.serve.listening.listen` opens it; closed at the end.
        told: called once with what is served, when each process has answered a real message.

    Raises:
        ClipgraftError: the model cannot be loaded, or was lost again and again.
    """
    try:
        if launch.web.workers == 1:
            return serve_one(launch, listening, told)
        with tempfile.TemporaryDirectory(prefix="clipgraft-serve-", ignore_cleanup_errors=True) as shared:
            return _Fleet(replace(launch, shared=Path(shared)), listening, told).run()
    finally:
        listening.close()
        leave(launch.web)


class _Fleet:
    """Keeps the processes running, each watched by a thread."""

    def __init__(self, launch: Launch, listening: socket.socket, told: Told) -> None:
        self._launch = launch
        self._listening = listening
        self._told = told
        self._lock = threading.Lock()
        self._processes: dict[int, BaseProcess] = {}
        self._ready: dict[int, Description] = {}
        self._stopping = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> int:
        """Run until all processes have ended after a signal, or because the model cannot be loaded."""
        threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"web {number}", daemon=True)
            for number in range(self._launch.web.workers)
        ]
        with self._signals():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # a signal is handled in between
        if self._failure is not None:
            raise self._failure
        return 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {kind: signal.signal(kind, self._stop) for kind in REQUESTS}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _stop(self, kind: int, _: FrameType | None) -> None:
        """Drain on the first signal; end at once on the second."""
        if self._stopping.is_set():
            for process in list(self._processes.values()):
                process.kill()
            end_at_once(kind, self._launch)
        log.info("stopping; a second signal ends it at once")
        self._end_all()

    def _end_all(self) -> None:
        self._stopping.set()
        for process in list(self._processes.values()):
            with contextlib.suppress(OSError, ValueError):
                process.terminate()

    def _keep(self, number: int) -> None:
        """Run one process again and again."""
        quick = 0
        while not self._stopping.is_set():
            process, receiver = self._start(number)
            was_ready = self._listen_to(number, receiver)
            process.join()
            self._launch_file(number).unlink(missing_ok=True)
            if self._stopping.is_set() or self._failure is not None:
                return
            quick = 0 if was_ready else quick + 1
            pause = _PAUSES.pause(quick)
            ended = told_end(process.exitcode)
            log.warning("web process %d %s; it is started again in %.1f s", number, ended, pause)
            self._stopping.wait(pause)

    def _start(self, number: int) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        job = pickle.dumps(self._launch.numbered(number))
        with sender, self._lock:
            process = context.Process(
                target=_serve, args=(job, self._listening, sender), name=process_name("web")
            )
            start_unsignalled(process)
            self._processes[number] = process
        if self._stopping.is_set():
            process.terminate()
        return process, receiver

    def _listen_to(self, number: int, receiver: Connection) -> bool:
        """Take in what a process says until it ends; whether it was ready."""
        was_ready = False
        with receiver:
            while True:
                try:
                    found = receiver.recv()
                except (EOFError, OSError):
                    return was_ready
                if isinstance(found, Exception):
                    self._fail(found)
                else:
                    was_ready = True
                    self._welcome(number, found)

    def _welcome(self, number: int, described: Description) -> None:
        with self._lock:
            before = len(self._ready)
            self._ready[number] = described
            if before < len(self._ready) == self._launch.web.workers:
                self._told(described)

    def _fail(self, error: Exception) -> None:
        """End all if the model cannot be loaded at the start; later that is one process's trouble."""
        with self._lock:
            if len(self._ready) == self._launch.web.workers or self._failure is not None:
                log.warning("a web process: %s", error)
                return
            self._failure = error
        self._end_all()

    def _launch_file(self, number: int) -> Path:
        assert self._launch.shared is not None
        return self._launch.shared / f"{number}.json"


def _serve(job: bytes, listening: socket.socket, sender: Connection) -> None:
    """Serve in a process of the fleet; tell the parent what is served, or why nothing is."""
    leave_terminal()
    die_with_parent()
    launch: Launch = pickle.loads(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops a Ctrl-C that came to the whole group until now
    code = 1
    with launch.output():
        try:
            let_signals_in()
            code = serve_one(launch, listening, sender.send)
        except ClipgraftError as error:
            with contextlib.suppress(OSError):
                sender.send(error)
        sys.stdout.flush()
    os._exit(code)
