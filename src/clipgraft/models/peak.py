"""The largest memory that a stretch of work took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Gives what tells, in MB, the most resident memory this process has had since; None where none can say.

    Linux keeps the mark, and lets a process reset its own. What earlier work freed is given back first, so
    that a stretch is not charged for it.
    """
    known = _reset()
    yield lambda: _high_water() if known else None


def _reset() -> bool:
    if not _CLEAR.exists():
        return False
    _give_back_freed()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed() -> None:
    gc.collect()
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # glibc alone keeps what is freed, and can return it
    if trim is not None:
        trim(0)


def _high_water() -> float | None:
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(match[1]) / 1000 if match else None
