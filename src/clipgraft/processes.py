"""Processes that clipgraft starts for itself: their names, and their end when their parent is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

_OURS = "clipgraft "
REQUESTS = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a process to stop."""


def process_name(what: str) -> str:
    """Name a process that is started here, so that it knows itself by `is_our_process`."""
    return f"{_OURS}{what}"


def is_our_process() -> bool:
    """Whether this is a process that clipgraft started for itself.

    A spawned process imports its parent's main module; a script that calls a command there without asking
    for `__name__` would start that command again.
    """
    return multiprocessing.current_process().name.startswith(_OURS)


def start_unsignalled(process: BaseProcess) -> None:
    """Start a process in which `REQUESTS` wait until it calls `let_signals_in`; here they wait meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in() -> None:
    """Receive the signals that were held back when this process was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


def leave_terminal() -> None:
    """Put this process into a group of its own: Ctrl-C goes to the parent, who decides what follows."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def die_with_parent() -> None:
    """Kill this process once its parent has ended, however that ended: by SIGKILL too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def told_end(code: int | None) -> str:
    """Say how a process ended, from its exit code as `multiprocessing` gives it."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (by hand, or by the system when memory is short)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with code {code}"
