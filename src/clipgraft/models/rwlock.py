"""A gate on each model: many threads may compute with it at once, one alone may change what hangs on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

_GATE = "_clipgraft_gate"
_FIRST_USE = threading.Lock()


class Gate:
    """A readers-writer lock; who waits to be alone goes before who comes later.

    Who prepares a change, such as loading an adapter, holds `changing` from its first look at the model to
    the end, so that two of them do not meet; only the change itself is `alone`. All of it may be entered
    again by a thread that is inside already, but nobody may begin a change while it computes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._alone = False
        self._changers = threading.RLock()
        self._here = threading.local()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Compute, or look at what the model is made of, beside others who do."""
        if self._is_in("changing") or self._is_in("shared"):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            with self._marked("shared"):
                yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Prepare and make a change while others compute, but change nothing."""
        with self._changers, self._marked("changing"):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Change adapters while nobody computes."""
        with self.changing():
            if self._is_in("alone"):
                yield
                return
            with self._changed:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._inside)
                finally:
                    self._waiting -= 1
                self._alone = True
            try:
                with self._marked("alone"):
                    yield
            finally:
                with self._changed:
                    self._alone = False
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

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        # A copied or pickled model is another model, which nobody is inside of.
        return Gate, ()


def gate_of(model: nn.Module) -> Gate:
    """The gate of a model, made when it is first asked for."""
    gate = model.__dict__.get(_GATE)
    if gate is None:
        with _FIRST_USE:
            gate = model.__dict__.setdefault(_GATE, Gate())
    assert isinstance(gate, Gate)
    return gate
