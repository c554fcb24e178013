"""A gate on each model: many threads may compute with it at once, one alone may change what hangs on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

_GATE = "_clipgraft_gate"
_FIRST_USE = threading.Lock()


class Gate:
    """A readers-writer lock; who waits to be alone goes before who comes later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Compute, beside others who compute. Not to be entered twice by one thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Change adapters while nobody computes."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._inside)
            finally:
                self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

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
