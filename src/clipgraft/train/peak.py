"""The largest memory that a stretch of work took."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Gives what tells, in MB, the most resident memory this process has had since; None where none can say.

    Linux keeps the mark, and lets a process reset its own.
    """
    try:
        _CLEAR.write_text("5")
        known = True
    except OSError:
        known = False
    yield lambda: _high_water() if known else None


def _high_water() -> float | None:
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(match[1]) / 1000 if match else None
