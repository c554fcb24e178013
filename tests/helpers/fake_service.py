"""A service without a model, for tests of the processes around one: what a text says is what happens."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.errors import ItemError, ModelError, OverloadedError, UnknownNameError
from clipgraft.serve import messages as m


@dataclass
class FakeService:
    """Encodes a text as its length; texts that begin with `!` are orders.

    `!sleep S`, `!block S` (with Python's lock let go, in the event loop), `!die`, `!fault`, `!overloaded`,
    `!item`, `!memory`.
    """

    state: m.State = "ready"
    cancelled: list[str] = field(default_factory=list)
    begin: Callable[[Callable[[], None]], Callable[[], object]] | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"items_text": 0, "batches_text": 0})

    async def answer(self, message: m.Message[Any], *, timeout: float | None = None) -> Any:
        if isinstance(message, m.Encode):
            return await self._encode(message)
        if isinstance(message, m.Describe):
            adapters = (m.AdapterInfo("vi", "somewhere"),)
            return m.Description("fake", "0" * 16, 2, 77, "cpu", "fp32", adapters)
        if isinstance(message, m.Stats):
            seconds = {"compute": {"0.01": 3.0, "inf": 1.0, "sum": 0.5}}
            return m.Statistics(
                {"adapter_hits": 2, **self.counts}, {"queue_text": 0.0, "rss_bytes": 5.0}, seconds,
                {"1": 3.0, "inf": 1.0, "sum": 7.0},
            )  # fmt: skip
        raise TypeError(type(message).__name__)

    async def _encode(self, message: m.Encode) -> m.Encoded:
        if message.using.adapter not in (None, "vi"):
            raise UnknownNameError(f"no adapter '{message.using.adapter}'")
        texts = [item.text for item in message.items if isinstance(item, m.Text)]
        for index, text in enumerate(texts):
            try:
                await self._obey(index, text)
            except asyncio.CancelledError:
                self.cancelled.append(text)
                raise
        self.counts["items_text"] += len(texts)
        rows = [(len(text), os.getpid()) for text in texts]
        return m.Encoded(np.array(rows, dtype=np.float32).reshape(-1, 2), tuple(len(t) for t in texts))

    async def _obey(self, index: int, text: str) -> None:
        order, _, value = text.partition(" ")
        if order == "!sleep":
            await asyncio.sleep(float(value))
        elif order == "!block":
            time.sleep(float(value))
        elif order == "!compute":  # as a batch in the compute thread does
            done = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(float(value), done.set_result, None)
            await asyncio.shield(done)
        elif order == "!die":
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a decoder would; os.kill may come later
        elif order == "!fault":
            raise ZeroDivisionError("a fault of ours")
        elif order == "!overloaded":
            raise OverloadedError("too much is waiting", 7.5)
        elif order == "!item":
            raise ItemError(index, "is an order")
        elif order == "!memory":
            raise MemoryError
        elif order == "!cancelled?":
            raise UnknownNameError(",".join(self.cancelled))
        elif order == "!computes?":
            names: list[str] = []
            assert self.begin is not None
            self.begin(lambda: names.append(threading.current_thread().name))()
            raise UnknownNameError(f"{names[0]}, and answers in {threading.current_thread().name}")
        elif order == "!garbage?":
            raise UnknownNameError(f"collected {gc.isenabled()}, frozen {gc.get_freeze_count() > 10_000}")

    async def close(self) -> None:
        self.state = "draining"


@dataclass(frozen=True)
class Recipe:
    """Builds a fake service.

    Attributes:
        log: each start adds a line with its process's number to this file.
        fails: the error that building it raises.
        deadly: how many starts end with SIGKILL.
        only_once: all starts but the first end so.
        seconds: that building it takes.
    """

    log: Path | None = None
    fails: str = ""
    deadly: int = 0
    only_once: bool = False
    seconds: float = 0.0
    threads: bool = False
    begin: Callable[[Callable[[], None]], Callable[[], object]] | None = None

    def computed_by(self, begin: Callable[[Callable[[], None]], Callable[[], object]]) -> Recipe:
        return replace(self, begin=begin)

    def __call__(self) -> FakeService:
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")
        if self.fails:
            raise ModelError(self.fails)
        starts = len(self.log.read_text().splitlines()) if self.log is not None else 1
        if starts <= self.deadly or (self.only_once and starts > 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.threads:
            threading.Thread(target=time.sleep, args=(60,)).start()
        time.sleep(self.seconds)
        return FakeService(begin=self.begin)
