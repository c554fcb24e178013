"""A backend that answers at once, fails, or waits as a test says; it computes nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from clipgraft.serve import messages as m

WIDTH = 4


class ScriptedBackend:
    """Gives every item the same vector.

    Attributes:
        error: what every question but `Describe` raises, if anything.
        hold: seconds that `Encode` takes.
        cancelled: set once a question was withdrawn.
        asked: the questions, in their order.
    """

    def __init__(self) -> None:
        self.state: m.State = "ready"
        self.error: BaseException | None = None
        self.hold = 0.0
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.closed = False
        self.asked: list[m.Message[Any]] = []

    async def answer(self, message: m.Message[Any], *, timeout: float | None = None) -> Any:
        if isinstance(message, m.Describe):
            adapters = (
                m.AdapterInfo("vi", "adapters/vi", "loaded"),
                m.AdapterInfo("shoes", "adapters/shoes"),
            )
            return m.Description("base", "0" * 16, WIDTH, 16, "cpu", "fp32", adapters)
        self.asked.append(message)
        if self.error is not None:
            raise self.error
        self.begun.set()
        try:
            await asyncio.sleep(self.hold)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        assert isinstance(message, m.Encode)
        count = len(message.items)
        return m.Encoded(np.full((count, WIDTH), 0.5, np.float32), (2,) * count)

    async def close(self) -> None:
        self.closed = True
