"""A readers-writer lock on each model: many threads compute with it, one alone changes its adapters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

_LOCK = "_clipgraft_lock"
_FIRST_USE = threading.Lock()


class RWLock:
    """A readers-writer lock in which a waiting writer goes before readers that come later.

    A thread that prepares a change, such as loading an adapter, holds `preparing` from its first look at the
    model to the end, so that no two prepare at once; only the change itself is inside `write`. A thread may
    enter each again that it is inside already, but it may not begin to prepare or write while it reads.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writing = False
        self._preparing = threading.RLock()
        self._here = threading.local()

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Compute, or look at what the model is made of, beside other readers."""
        if self._is_in("preparing") or self._is_in("read"):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            with self._marked("read"):
                yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Prepare a change while others read; the change itself is made inside `write`."""
        with self._preparing, self._marked("preparing"):
            yield

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Change adapters while nobody reads."""
        with self.preparing():
            if self._is_in("write"):
                yield
                return
            with self._changed:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._readers)
                finally:
                    self._waiting -= 1
                self._writing = True
            try:
                with self._marked("write"):
                    yield
            finally:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()

    def _is_in(self, what: str) -> bool:
        """Whether this thread is inside."""
        return getattr(self._here, what, 0) > 0

    @contextlib.contextmanager
    def _marked(self, what: str) -> Iterator[None]:
        setattr(self._here, what, getattr(self._here, what, 0) + 1)
        try:
            yield
        finally:
            setattr(self._here, what, getattr(self._here, what) - 1)

    def __reduce__(self) -> tuple[type[RWLock], tuple[()]]:
        # A copied or pickled model is another model, which nobody is inside of.
        return RWLock, ()


def rwlock_of(model: nn.Module) -> RWLock:
    """Get the lock of a model, made on first use."""
    lock = model.__dict__.get(_LOCK)
    if lock is None:
        with _FIRST_USE:
            lock = model.__dict__.setdefault(_LOCK, RWLock())
    assert isinstance(lock, RWLock)
    return lock
