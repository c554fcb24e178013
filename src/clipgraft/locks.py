"""Locks on folders that are written to: held by a living process, and gone with it however it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipgraft.errors import BusyError
from clipgraft.writing import writing

log = logging.getLogger("clipgraft")
LOCK = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# System locks do not keep two threads of one process apart. What a forked child has of this says nothing.
_HELD: dict[Path, int] = {}
_GUARD = threading.Lock()


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds.

    Attributes:
        real: False on a file system without locks, where nothing keeps others out.
    """

    path: Path
    handle: int
    real: bool

    def release(self, remove: bool = True) -> None:
        """Let go of it; with `remove` its file goes first, while nobody else can hold it."""
        try:
            if remove:
                with contextlib.suppress(OSError):
                    self.path.unlink()
        finally:
            os.close(self.handle)
            with _GUARD:
                _HELD.pop(_place(self.path), None)


@contextlib.contextmanager
def sole_owner(path: Path, what: str, advice: str) -> Iterator[None]:
    """Hold the lock file `path` for a `with` block; folders above it are made.

    A process that is killed holds nothing any more, on whatever host: its lock is taken over.

    Args:
        what: the sentence's beginning, such as "run logs/one".
        advice: what to do where it is taken.

    Raises:
        BusyError: another process or thread holds it; says which.
        WriteError: the file cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire(path)
    if lock is None:
        raise _busy(path, what, advice)
    if not lock.real:
        log.warning("%s: this file system has no locks; make sure that no other process writes there", path)
    try:
        yield
    finally:
        lock.release()


def require_free(path: Path, what: str, advice: str) -> None:
    """Raise BusyError as `sole_owner` would; nothing is written, and nothing is held afterwards."""
    if path.exists():
        lock = acquire(path)
        if lock is None:
            raise _busy(path, what, advice)
        lock.release(remove=False)


def acquire(path: Path) -> Lock | None:
    """The lock of a file, which is made; None where somebody else holds it. Raises OSError."""
    place = _place(path)
    with _GUARD:
        if _HELD.get(place) == os.getpid():
            return None
        _HELD[place] = os.getpid()
    try:
        lock = _take(path)
    except BaseException:
        with _GUARD:
            _HELD.pop(place, None)
        raise
    if lock is None:
        with _GUARD:
            _HELD.pop(place, None)
    return lock


def _take(path: Path) -> Lock | None:
    while True:
        # Not opened by `with`: closing it is what lets go of the lock.
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _lock(handle)
            if taken is False:
                os.close(handle)
                return None
            if _is_still(path, handle):
                _sign(handle)
                return Lock(path, handle, real=taken is True)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner removed the file between the two calls


def _place(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write who holds it, for messages alone: on a full disk the lock holds as well without."""
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(owner).encode())


def _busy(path: Path, what: str, advice: str) -> BusyError:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {int(owner['process'])} on {str(owner['host'])!r} since {str(owner['since'])!r}"
        who = who.replace("'", "")
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return BusyError(f"{what} is in use by {who}: {advice}")


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool | None:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool | None:
        """Whether the lock was free; None where the file system has none.

        Of the process, not of the handle as those of `filelock`: loader processes that outlive a killed
        owner hold nothing.
        """
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in _BUSY else None
        return True
