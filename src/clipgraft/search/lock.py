"""One writer at a time in a folder; a writer that is killed lets go of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from clipgraft.errors import DataError

LOCK = ".lock"
_HELD: set[Path] = set()  # system locks do not keep two threads of one process apart


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, which is made; raises DataError where one is at work already."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    busy = DataError(f"{folder}: another process is writing there; wait for it, or name another folder")
    if place in _HELD:
        raise busy
    # Not opened by `with`: closing it is what lets go of the lock.
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(handle):
            raise busy
        _HELD.add(place)
        try:
            yield
        finally:
            _HELD.discard(place)
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Of the process, not of the handle: loader processes that outlive a killed writer hold nothing."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
