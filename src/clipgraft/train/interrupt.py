"""Stopping a run by Ctrl-C or SIGTERM: between two steps, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_NOTICE = b"\nstopping after this step, then saving; once more stops at once, without saving\n"
_REQUESTS = (signal.SIGINT, signal.SIGTERM)
# A terminal or job scheduler signals the loader's processes too, and when one of them dies torch raises,
# wherever the step is. Windows has no such signal.
_CHILD_DIED = (signal.SIGCHLD,) if hasattr(signal, "SIGCHLD") else ()


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, has saved itself, and can be resumed. No `except Exception` catches it.

    Attributes:
        signal: which one asked last; the command ends with 128 and its number, as shells have it.
    """

    signal: int = signal.SIGINT


@contextlib.contextmanager
def stop_requests(quiet: bool = False) -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one acts as if this were not here.

    The first one prints a notice, unless `quiet`. Outside the main thread no signal arrives, and the
    event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[signal.Signals, Any] = {kind: signal.getsignal(kind) for kind in _REQUESTS}
    owner = os.getpid()

    def request(kind: int, _: object) -> None:
        if os.getpid() != owner:  # a loader's process that inherited this handler: its owner ends it
            return
        stop.set()
        Interrupted.signal = kind
        if not quiet:
            os.write(2, _NOTICE)  # what print and logging use may be locked by the code this interrupts
        _set(before)
        for child in _CHILD_DIED:
            before[child] = signal.signal(child, signal.SIG_DFL)

    _set(dict.fromkeys(_REQUESTS, request))
    try:
        yield stop
    finally:
        _set(before)


def _set(handlers: dict[signal.Signals, Any]) -> None:
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
