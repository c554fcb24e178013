"""Rows of many requests computed together by one thread, in batches filled by cost.

Each tower has a queue. The thread takes the oldest rows of a queue until they cost what a batch may (tokens,
patches), whatever adapters they want, and the queues take turns. Clients that got an answer soon ask again,
so it waits a few milliseconds until as many rows are there as when it last began. What is queued is known in
seconds, by what a token has cost so far: requests that would wait too long are refused with the time after
which there will be room.

A batch that fails is halved until the rows that fail are alone, so that only their requests do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from clipgraft.errors import ItemError, OverloadedError, UnavailableError
from clipgraft.lora.state import Adapter
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.serve.computing import Computing
from clipgraft.serve.counters import Counters
from clipgraft.serve.messages import Vectors

log = logging.getLogger("clipgraft")
_KINDS: dict[Tower, str] = {"text": "text", "vision": "image"}
_FADING = 0.8
_LEAST_COST = 64
_LEAST_RETRY = 0.5


@dataclass(frozen=True)
class BatchLimits:
    """When a batch is full, and when a queue is.

    Attributes:
        cost: most tokens and patches of a batch; one row may cost more.
        wait: most seconds that a batch waits for more rows; half of what the last one took at the most.
        queue: seconds of computing that may be waiting.
    """

    cost: int = 4096
    wait: float = 0.02
    queue: float = 10.0


@dataclass(frozen=True)
class Row:
    """An input of a tower, (L,) token ids or (3, H, W) pixels, and how many tokens or patches it costs."""

    input: Tensor
    cost: int


class Encode(Protocol):
    """What computes a batch."""

    def __call__(self, tower: Tower, inputs: Sequence[Tensor], adapters: Sequence[Adapter | None]) -> Vectors:
        """Inputs of one shape, and the adapter of each -> (B, D) unit-norm fp32."""


@dataclass(eq=False)
class _Job:
    """Rows of one request.

    Attributes:
        begun: how many were taken into batches.
        missing: how many are not computed yet.
        left: what those that were not begun cost.
        deadline: the time until which it must be begun.
    """

    tower: Tower
    rows: Sequence[Row]
    adapter: Adapter | None
    deadline: float
    future: Future[Vectors]
    arrived: float
    left: int
    begun: int = 0
    missing: int = 0
    vectors: Vectors | None = None


@dataclass
class _Queue:
    """Jobs of a tower, oldest first, and what they cost.

    What a token takes is measured over the last batches, each of which costs something even with few tokens.
    """

    jobs: deque[_Job] = field(default_factory=deque)
    cost: int = 0
    measured_cost: float = 0.0
    measured_seconds: float = 0.0

    def measure(self, cost: int, seconds: float) -> None:
        self.measured_cost = _FADING * self.measured_cost + max(cost, _LEAST_COST)
        self.measured_seconds = _FADING * self.measured_seconds + seconds

    def seconds_of(self, cost: int) -> float:
        """What rows of a cost would take."""
        if not cost or not self.measured_cost:
            return 0.0
        return max(cost, _LEAST_COST) * self.measured_seconds / self.measured_cost


_Part: TypeAlias = tuple[_Job, int]


class Batcher:
    """Computes rows in one thread, by default of its own; any thread may submit and cancel."""

    def __init__(
        self,
        encode: Encode,
        limits: BatchLimits,
        counters: Counters | None = None,
        computing: Computing | None = None,
    ) -> None:
        self._encode = encode
        self._limits = limits
        self._counters = counters or Counters()
        self._changed = threading.Condition()
        self._queues: dict[Tower, _Queue] = {tower: _Queue() for tower in TOWERS}
        self._busy: tuple[float, float] = (0.0, 0.0)  # since when, and for how long by estimate
        self._last: Tower = "vision"
        self._expected = 1  # rows that waited when the last batch was taken
        self._took = 0.0  # seconds, the last batch
        self._closing = False
        self._failure = ""
        self._computing = computing or Computing()
        self._join = self._computing.begin(self._run)

    @property
    def failure(self) -> str:
        """Why nothing is computed any more; empty while all is well."""
        return self._failure

    @property
    def gauges(self) -> dict[str, float]:
        """Rows that wait, by kind, and the seconds they would take."""
        with self._changed:
            rows = {
                f"queue_{_KINDS[tower]}": float(sum(len(job.rows) - job.begun for job in queue.jobs))
                for tower, queue in self._queues.items()
            }
            return {**rows, "queue_seconds": self._waiting()}

    def submit(
        self,
        tower: Tower,
        rows: Sequence[Row],
        adapter: Adapter | None,
        deadline: float = float("inf"),
        accepted: bool = False,
    ) -> Future[Vectors]:
        """Queue rows of one request -> (N, D) unit-norm fp32; cancel the future to withdraw what waits.

        Args:
            tower: that computes them.
            rows: one at least.
            adapter: what they are computed with; None is the base.
            deadline: `time.monotonic()` until which the last must be begun.
            accepted: other rows of the request were accepted: these are, too.

        Raises (here or as the future's exception):
            OverloadedError: what waits would take too long.
            UnavailableError: it was not begun in time, or nothing is computed any more.
            ItemError: a row failed, by its number.
        """
        now, cost = time.monotonic(), sum(row.cost for row in rows)
        future: Future[Vectors] = Future()
        job = _Job(tower, rows, adapter, deadline, future, now, cost, missing=len(rows))
        with self._changed:
            self._check_open()
            waiting = self._waiting()
            room = min(self._limits.queue, deadline - now)
            if waiting > room and not accepted:
                self._counters.add("rejected", len(rows))
                raise OverloadedError(
                    f"{waiting:.1f} s of work are waiting", max(_LEAST_RETRY, waiting - room + _LEAST_RETRY)
                )
            queue = self._queues[tower]
            queue.jobs.append(job)
            queue.cost += cost
            self._changed.notify_all()
        future.add_done_callback(lambda done: self._withdraw(job) if done.cancelled() else None)
        return future

    def close(self) -> None:
        """Compute what was accepted, accept nothing more, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._join()

    def _check_open(self) -> None:
        if self._failure:
            raise UnavailableError(f"the model does not compute any more ({self._failure})")
        if self._closing:
            raise UnavailableError("the model is stopping")

    def _waiting(self) -> float:
        """Seconds until a row that came now would be begun."""
        since, estimate = self._busy
        under_way = max(0.0, estimate - (time.monotonic() - since))
        return under_way + sum(queue.seconds_of(queue.cost) for queue in self._queues.values())

    def _withdraw(self, job: _Job) -> None:
        with self._changed:
            self._counters.add("cancelled", job.missing)
            self._remove(job)

    def _remove(self, job: _Job) -> None:
        queue = self._queues[job.tower]
        if job in queue.jobs:
            queue.jobs.remove(job)
            queue.cost -= job.left
            job.left = 0

    def _run(self) -> None:
        """Compute until the end; a failure of this loop itself is told to all who wait."""
        parts: list[_Part] | None = None
        try:
            while (parts := self._next()) is not None:
                # Anew: where another thread starts `alone`, MKL takes one for the whole process.
                torch.set_num_threads(self._computing.threads)
                self._compute(parts)
        except BaseException as error:
            self._failure = " ".join(f"{type(error).__name__}: {error}".split())
            log.exception("the thread that computes has ended")
            with self._changed:
                jobs = [job for queue in self._queues.values() for job in queue.jobs]
                for queue in self._queues.values():
                    queue.jobs.clear()
                    queue.cost = 0
            for job in [*(job for job, _ in parts or ()), *jobs]:
                _fail(job, UnavailableError(f"the model does not compute any more ({self._failure})"))

    def _next(self) -> list[_Part] | None:
        """Wait for a batch; None at the end."""
        expired: list[_Job] = []
        with self._changed:
            parts: list[_Part] = []
            while not parts:
                if not self._wait():
                    return None
                self._expected = self._rows_waiting()
                parts = self._take(expired)
                if expired:
                    break
            cost = sum(job.rows[n].cost for job, n in parts)
            self._busy = (time.monotonic(), self._queues[self._last].seconds_of(cost))
        for job in expired:
            self._counters.add("expired", job.missing)
            _fail(job, UnavailableError("the request was not begun within its time"))
        return parts

    def _wait(self) -> bool:
        """Wait until there are rows, and for about as many as last time; False at the end."""
        while not any(queue.jobs for queue in self._queues.values()):
            if self._closing:
                return False
            self._busy = (0.0, 0.0)
            self._changed.wait()
        until = time.monotonic() + min(self._limits.wait, self._took / 2)
        while not self._closing and not self._enough() and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)
        return True

    def _enough(self) -> bool:
        full = any(queue.cost >= self._limits.cost for queue in self._queues.values())
        return full or self._rows_waiting() >= self._expected

    def _rows_waiting(self) -> int:
        return sum(len(job.rows) - job.begun for queue in self._queues.values() for job in queue.jobs)

    def _take(self, expired: list[_Job]) -> list[_Part]:
        """The rows of the next batch; jobs whose time is over are removed and put on the list."""
        first: Tower = "text" if self._last == "vision" else "vision"
        self._last = first if self._queues[first].jobs else self._last
        queue, now = self._queues[self._last], time.monotonic()
        parts: list[_Part] = []
        cost, shape = 0, None
        for job in list(queue.jobs):
            if job.deadline < now:
                self._remove(job)
                expired.append(job)
                continue
            while job.begun < len(job.rows):
                row = job.rows[job.begun]
                shape = row.input.shape if shape is None else shape
                if parts and (cost + row.cost > self._limits.cost or row.input.shape != shape):
                    return parts
                parts.append((job, job.begun))
                cost += row.cost
                job.begun += 1
                job.left -= row.cost
                queue.cost -= row.cost
            queue.jobs.remove(job)
        return parts

    def _compute(self, parts: list[_Part]) -> None:
        if not parts:
            return
        tower, started = parts[0][0].tower, time.perf_counter()
        now = time.monotonic()
        for job in {id(job): job for job, _ in parts}.values():
            self._counters.observe("queue", now - job.arrived)
        self._halve(tower, [part for part in parts if not part[0].future.done()])
        seconds, cost = time.perf_counter() - started, sum(job.rows[n].cost for job, n in parts)
        self._counters.observe("compute", seconds)
        self._counters.observe_batch(len(parts))
        self._counters.add(f"batches_{_KINDS[tower]}")
        self._counters.add(f"items_{_KINDS[tower]}", len(parts))
        self._queues[tower].measure(cost, seconds)
        self._took = seconds

    def _halve(self, tower: Tower, parts: list[_Part]) -> None:
        """Compute parts; those that fail alone fail their jobs."""
        if not parts:
            return
        try:
            inputs = [job.rows[number].input for job, number in parts]
            vectors = self._encode(tower, inputs, [job.adapter for job, _ in parts])
        except Exception as error:  # whatever a row makes a library raise
            if len(parts) > 1:
                middle = len(parts) // 2
                self._halve(tower, parts[:middle])
                self._halve(tower, [part for part in parts[middle:] if not part[0].future.done()])
                return
            job, number = parts[0]
            _fail(job, _told(error, number))
            with self._changed:
                self._remove(job)
            return
        for (job, number), vector in zip(parts, vectors, strict=True):
            _give(job, number, vector)


def _give(job: _Job, number: int, vector: Vectors) -> None:
    if not np.isfinite(vector).all():
        _fail(job, ItemError(number, "its features are not finite: the model or its adapter is damaged"))
        return
    if job.vectors is None:
        job.vectors = np.empty((len(job.rows), len(vector)), np.float32)
    job.vectors[number] = vector
    job.missing -= 1
    if not job.missing and not job.future.done():
        try:
            job.future.set_result(job.vectors)
        except InvalidStateError:  # cancelled this moment
            return


def _told(error: Exception, number: int) -> Exception:
    log.warning("a row cannot be computed", exc_info=error)
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return UnavailableError("there is not enough memory")
    line = " ".join(str(error).split())
    return ItemError(number, f"cannot be computed ({type(error).__name__}: {line[:200]})")


def _fail(job: _Job, error: Exception) -> None:
    if job.future.done():
        return
    try:
        job.future.set_exception(error)
    except InvalidStateError:  # cancelled this moment
        return
