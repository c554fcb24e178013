"""`Worker`: a model in a process of its own that may die or hang without taking the server along."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from clipgraft.errors import ItemError, ModelError, OverloadedError, UnavailableError, UnknownNameError
from clipgraft.serve import messages as m
from clipgraft.serve.worker import Supervision, Worker
from fake_service import Recipe

FAST = Supervision(silent=1.5, stuck=1.5, most_quick=3, first_pause=0.01, longest_pause=0.02, close=5)


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own, for a minute at most."""

    def run(**values: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**values), 60))

    run.__doc__, run.__name__ = test.__doc__, test.__name__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


@asynccontextmanager
async def working(recipe: Recipe | None = None, rules: Supervision = FAST) -> AsyncIterator[Worker]:
    worker = Worker(recipe or Recipe(), rules).start()
    try:
        await worker.ready()
        yield worker
    finally:
        await worker.close()


def encode(*texts: str, using: m.With = m.BASE) -> m.Encode:
    return m.Encode(tuple(map(m.Text, texts)), using)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def until(true: Callable[[], bool], seconds: float = 20) -> None:
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to that")


@asynchronous
async def test_the_main_thread_computes() -> None:
    """OpenMP would let its threads sleep between two steps of a model, and a text take half as long again."""
    async with working() as worker:
        with pytest.raises(UnknownNameError, match="MainThread, and answers in clipgraft-process"):
            await worker.answer(encode("!computes?"))


@asynchronous
async def test_many_at_once_come_back_in_any_order() -> None:
    """One slow request would hold up all others, or somebody would get another's vectors."""
    async with working() as worker:
        order: list[int] = []

        async def ask(number: int) -> None:
            delay = f"!sleep {0.3 - number / 1000:.3f}"
            answer = await worker.answer(encode(delay, "x" * number))
            assert answer.vectors[:, 0].tolist() == [len(delay), number]
            order.append(number)

        await asyncio.gather(*map(ask, range(200)))
        assert order != sorted(order)
        assert worker.in_flight == 0


@asynchronous
async def test_large_messages_cross() -> None:
    """A batch of pictures would stop at the size of a pipe's buffer."""
    async with working() as worker:
        big = "x" * (24 << 20)
        answers = await asyncio.gather(*(worker.answer(encode(big)) for _ in range(3)))
        assert [answer.vectors[0, 0] for answer in answers] == [len(big)] * 3


@asynchronous
async def test_errors_cross_with_what_they_know() -> None:
    """A client would hear of a fault of ours instead of its own, or not when to come back."""
    async with working() as worker:
        with pytest.raises(ItemError) as item:
            await worker.answer(encode("fine", "!item"))
        assert (item.value.index, item.value.reason) == (1, "is an order")
        with pytest.raises(OverloadedError) as full:
            await worker.answer(encode("!overloaded"))
        assert full.value.retry_after == 7.5
        with pytest.raises(UnknownNameError, match="no adapter 'fr'"):
            await worker.answer(encode("x", using=m.With("fr")))
        with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of ours"):
            await worker.answer(encode("!fault"))
        with pytest.raises(UnavailableError, match="no memory"):
            await worker.answer(encode("!memory"))
        assert worker.state == "ready"
        assert worker.restarts == 0


@asynchronous
async def test_withdrawn_and_late_messages() -> None:
    """A client that went away would be computed for; one that waits would wait for ever."""
    async with working() as worker:
        asking = asyncio.create_task(worker.answer(encode("!sleep 30")))
        await asyncio.sleep(0.1)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        rules = Supervision(grace=0.0)
        worker._rules = rules
        with pytest.raises(UnavailableError, match=r"no answer within 0\.1 s"):
            await worker.answer(encode("!sleep 20"), timeout=0.1)
        with pytest.raises(UnknownNameError, match="!sleep 30,!sleep 20"):
            await worker.answer(encode("!cancelled?"))
        assert worker.in_flight == 0


@pytest.mark.parametrize("how", ["kill", "segfault"])
@asynchronous
async def test_a_process_that_dies_is_started_again(how: str) -> None:
    """One picture that crashes a decoder would end the service, or leave its clients waiting."""
    async with working() as worker:
        states: list[m.State] = []
        worker._told = states.append
        first = worker.pid
        assert first is not None
        asking = [asyncio.create_task(worker.answer(encode("!sleep 30"))) for _ in range(20)]
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        if how == "kill":
            os.kill(first, signal.SIGKILL)
        else:
            asking.append(asyncio.create_task(worker.answer(encode("!die"))))
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert time.monotonic() - begun < 2
        assert all(isinstance(answer, UnavailableError) and answer.retry_after > 0 for answer in answers)
        await until(lambda: worker.state != "ready")
        with pytest.raises(UnavailableError, match="the model is restarting"):
            await worker.answer(encode("x"))
        await worker.ready()
        assert (await worker.answer(encode("xyz"))).vectors[0, 0] == 3
        assert worker.pid != first
        assert states == ["restarting", "ready"]
        assert worker.reason.startswith("was ended by " + ("SIGKILL" if how == "kill" else "SIGSEGV"))
        assert worker.restarts == 1


@asynchronous
async def test_a_process_that_never_comes_up(tmp_path: Path) -> None:
    """A model too large for the machine would be loaded again and again, and nobody would be told."""
    log = tmp_path / "starts"
    worker = Worker(Recipe(log, deadly=99), FAST).start()
    with pytest.raises(UnavailableError, match="the model is starting"):
        await worker.answer(encode("x"))
    with pytest.raises(Exception, match=r"was ended by SIGKILL .*, 3 times in a row"):
        await worker.ready()
    assert worker.state == "failed"
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(UnavailableError, match=r"the model failed: .*SIGKILL"):
        await worker.answer(encode("x"))
    await worker.close()


@asynchronous
async def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """A mistyped model would be tried five times, and its reason lost in another process."""
    log = tmp_path / "starts"
    worker = Worker(Recipe(log, fails="no such model"), FAST).start()
    with pytest.raises(ModelError, match="no such model"):
        await worker.ready()
    assert (worker.state, worker.reason) == ("failed", "no such model")
    assert len(log.read_text().splitlines()) == 1
    await worker.close()


@asynchronous
async def test_a_start_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    """A moment of short memory at the start would end the service."""
    async with working(Recipe(tmp_path / "starts", deadly=2)) as worker:
        assert worker.restarts == 2
        assert (await worker.answer(encode("x"))).tokens == (1,)


@pytest.mark.parametrize(("order", "why"), [("!block 60", "no sign of life"), ("!sleep 60", "no progress")])
@asynchronous
async def test_a_process_that_hangs_is_killed(order: str, why: str) -> None:
    """A deadlock would keep the server up and silent for ever."""
    async with working() as worker:
        with pytest.raises(UnavailableError, match="was lost"):
            await worker.answer(encode(order))
        await worker.ready()
        assert why in worker.reason
        assert (await worker.answer(encode("x"))).tokens == (1,)


@asynchronous
async def test_idle_is_no_hang() -> None:
    """A server that nobody asks would be killed again and again."""
    async with working(rules=Supervision(silent=0.4, stuck=0.4)) as worker:
        pid = worker.pid
        await asyncio.sleep(1.5)
        assert (worker.pid, worker.restarts) == (pid, 0)


@asynchronous
async def test_what_is_under_way_ends_before_a_close() -> None:
    """A restart for a new version would cost requests."""
    worker = Worker(Recipe(threads=True), FAST).start()
    await worker.ready()
    pid = worker.pid
    asking = asyncio.create_task(worker.answer(encode("!sleep 0.5")))
    await asyncio.sleep(0.1)
    worker.drain()
    assert worker.state == "draining"
    late = asyncio.create_task(worker.answer(encode("still taken")))
    await asyncio.sleep(0.05)
    await worker.close()
    assert (await asking).tokens == (10,)
    assert (await late).tokens == (11,)
    with pytest.raises(UnavailableError, match="is stopping"):
        await worker.answer(encode("x"))
    assert pid is not None
    assert not alive(pid)


@asynchronous
async def test_what_is_given_up_at_the_end_of_a_drain() -> None:
    """A request that takes too long would be cut off without an answer."""
    async with working() as worker:
        asking = asyncio.create_task(worker.answer(encode("!sleep 30")))
        await asyncio.sleep(0.1)
        worker.abandon("the server stops")
        with pytest.raises(UnavailableError, match="the server stops"):
            await asking


@asynchronous
async def test_close_while_starting() -> None:
    """Ctrl-C at a mistyped model would wait for its download."""
    worker = Worker(Recipe(seconds=60), FAST).start()
    await until(lambda: worker.pid is not None)
    pid, begun = worker.pid, time.monotonic()
    await worker.close()
    assert time.monotonic() - begun < 3
    assert pid is not None
    assert not alive(pid)


PARENT = """
import asyncio, sys
from clipgraft.serve.worker import Worker
from fake_service import Recipe

async def main():
    worker = Worker(Recipe()).start()
    await worker.ready()
    assert "torch" not in sys.modules
    print(worker.pid, flush=True)
    if sys.argv[1] == "leave":
        sys.exit(0)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kill", "leave", "interrupt"])
def test_the_process_ends_with_its_parent(how: str, tmp_path: Path) -> None:
    """A killed server would leave its model on the GPU; and torch would be loaded twice."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    helpers = str(Path(__file__).parents[1] / "helpers")
    paths = os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert how == "leave" or alive(pid)
        if how == "kill":
            parent.kill()
        elif how == "interrupt":
            os.killpg(parent.pid, signal.SIGINT)
        parent.wait(10)
    for _ in range(200):
        if not alive(pid):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the model's process outlived its parent")


@asynchronous
async def test_what_stays_is_not_looked_through_for_garbage() -> None:
    """Now and then all requests would stand still for half a second; or memory would never be given back."""
    async with working() as worker:
        with pytest.raises(UnknownNameError, match="collected True, frozen True"):
            await worker.answer(encode("!garbage?"))
