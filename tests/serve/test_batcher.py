"""The batcher with arithmetic in place of a model: who gets which row, and what one failure costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgraft.errors import ItemError, OverloadedError, UnavailableError
from clipgraft.lora.state import Adapter
from clipgraft.models.sites import Tower
from clipgraft.serve.batcher import Batcher, BatchLimits, Row
from clipgraft.serve.counters import Counters
from clipgraft.serve.messages import Vectors

POISON, NAN, NO_MEMORY = 666.0, 667.0, 668.0


class Model:
    """Doubles its inputs, when it is allowed to; remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()
        self.batches: list[tuple[Tower, list[float]]] = []

    def __call__(self, tower: Tower, inputs: Sequence[Tensor], adapters: Sequence[Adapter | None]) -> Vectors:
        values = [float(value[0]) for value in inputs]
        self.batches.append((tower, values))
        self.begun.set()
        assert self.open.wait(10)
        if POISON in values:
            raise RuntimeError("poison")
        if NO_MEMORY in values:
            raise MemoryError
        doubled = 2 * torch.stack(list(inputs)).numpy().astype(np.float32)
        doubled[[value == NAN for value in values]] = np.nan
        return doubled


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def batcher(model: Model, counters: Counters) -> Iterator[Batcher]:
    made = Batcher(model, BatchLimits(cost=8, wait=0.001, queue=5), counters)
    yield made
    model.open.set()
    made.close()


def rows(*values: float, cost: int = 1) -> list[Row]:
    return [Row(torch.tensor([value, value]), cost) for value in values]


def hold(batcher: Batcher, model: Model) -> None:
    """Let the thread be busy with a row, so that what follows queues."""
    model.open.clear()
    model.begun.clear()
    batcher.submit("text", rows(0), None)
    assert model.begun.wait(10)


def test_everybody_gets_their_own_rows(batcher: Batcher) -> None:
    """A request is answered with another's vectors."""
    jobs = [rows(*range(start, start + start % 5 + 1)) for start in range(1, 100)]
    towers: list[Tower] = ["text" if len(job) % 2 else "vision" for job in jobs]
    futures = [batcher.submit(tower, job, None) for tower, job in zip(towers, jobs, strict=True)]
    for job, future in zip(jobs, futures, strict=True):
        assert future.result(10).tolist() == [[2 * float(v) for v in row.input] for row in job]


def test_batches_are_filled_by_cost_oldest_first(batcher: Batcher, model: Model) -> None:
    """A batch of long texts takes ten times the memory and time of one of short texts."""
    hold(batcher, model)
    futures = [batcher.submit("text", rows(value, cost=3), None) for value in (1, 2, 3, 4)]
    futures.append(batcher.submit("text", rows(5, cost=100), None))
    futures.append(batcher.submit("vision", rows(6), None))
    model.open.set()
    for future in futures:
        future.result(10)
    assert model.batches[1:] == [
        ("vision", [6.0]),
        *[("text", values) for values in ([1.0, 2.0], [3.0, 4.0], [5.0])],
    ], "the queues take turns, and a row that costs more than a batch goes alone"


def test_only_the_guilty_rows_fail(batcher: Batcher, model: Model, counters: Counters) -> None:
    """One poisonous picture fails everybody whose pictures are in the same batch."""
    hold(batcher, model)
    good = [batcher.submit("text", rows(value), None) for value in (1, 2, 3)]
    bad = batcher.submit("text", rows(4, POISON), None)
    hungry, broken = batcher.submit("text", rows(NO_MEMORY), None), batcher.submit("text", rows(NAN), None)
    model.open.set()
    assert [future.result(10)[0, 0] for future in good] == [2, 4, 6]
    with pytest.raises(ItemError, match="poison") as told:
        bad.result(10)
    assert told.value.index == 1
    with pytest.raises(UnavailableError, match="not enough memory"):
        hungry.result(10)
    with pytest.raises(ItemError, match="not finite"):
        broken.result(10)
    assert batcher.failure == ""
    assert batcher.submit("text", rows(7), None).result(10)[0, 0] == 14


def test_withdrawn_rows_are_not_computed(batcher: Batcher, model: Model, counters: Counters) -> None:
    """Clients that went away keep the model busy, and count as a queue."""
    hold(batcher, model)
    gone, stays = batcher.submit("text", rows(1, 2, 3), None), batcher.submit("text", rows(4), None)
    assert gone.cancel()
    assert batcher.gauges["queue_text"] == 1
    model.open.set()
    assert stays.result(10)[0, 0] == 8
    with pytest.raises(CancelledError):
        gone.result(10)
    assert model.batches[1:] == [("text", [4.0])]
    assert counters.told()[0]["cancelled"] == 3


def test_a_full_queue_refuses_and_says_for_how_long(
    batcher: Batcher, model: Model, counters: Counters
) -> None:
    """A burst makes everybody wait for minutes in place of a 429; or a lone request is refused."""
    with_queue = BatchLimits(cost=8, wait=0, queue=0.2)
    slow = Batcher(lambda *batch: (time.sleep(0.1), model(*batch))[1], with_queue, counters)
    slow.submit("text", rows(1, cost=64), None).result(10)
    more = iter(range(30))
    taken = []

    def fill() -> None:
        for value in more:
            taken.append(slow.submit("text", rows(float(value), cost=64), None))  # noqa: PERF401

    with pytest.raises(OverloadedError, match="s of work are waiting; try again in") as told:
        fill()
    assert 2 <= len(taken) <= 6
    assert 0.1 <= told.value.retry_after < 5
    with pytest.raises(OverloadedError):
        slow.submit("text", rows(1), None, time.monotonic() + 0.05)
    assert slow.submit("text", rows(9, cost=64), None, accepted=True).result(10)[0, 0] == 18
    assert [future.result(10)[0, 0] for future in taken] == [2 * value for value in range(len(taken))]
    assert slow.submit("text", rows(*[1.0] * 5, cost=64), None).result(20).shape == (5, 2)
    slow.close()


def test_what_is_late_is_not_begun(batcher: Batcher, model: Model, counters: Counters) -> None:
    """Rows that nobody waits for any more are computed before those that somebody does."""
    hold(batcher, model)
    late = batcher.submit("text", rows(1), None, time.monotonic() + 0.05)
    fine = batcher.submit("text", rows(2), None, time.monotonic() + 60)
    time.sleep(0.1)
    model.open.set()
    with pytest.raises(UnavailableError, match="not begun within its time"):
        late.result(10)
    assert fine.result(10)[0, 0] == 4
    assert ("text", [2.0]) in model.batches
    assert all(1.0 not in values for _, values in model.batches)


def test_the_end(batcher: Batcher, model: Model) -> None:
    """What was accepted before a stop is lost, or what comes after hangs for ever."""
    hold(batcher, model)
    accepted = batcher.submit("text", rows(1), None)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(UnavailableError, match="stopping"):
        batcher.submit("text", rows(2), None)
    model.open.set()
    closing.join(10)
    assert accepted.result(10)[0, 0] == 2


def test_a_dead_thread_is_told(model: Model, counters: Counters) -> None:
    """The thread that computes dies, all requests hang, and the health check says that all is well."""

    def dies(*batch: object) -> Vectors:
        raise SystemExit("killed")

    batcher = Batcher(dies, BatchLimits(), counters)
    with pytest.raises(UnavailableError, match=r"does not compute any more \(SystemExit: killed\)"):
        batcher.submit("text", rows(1), None).result(10)
    assert batcher.failure == "SystemExit: killed"
    with pytest.raises(UnavailableError, match="does not compute any more"):
        batcher.submit("text", rows(1), None)
    batcher.close()
