"""Run one cell of a sweep in its own process, so that its peak memory is its own.

On Ctrl-C and SIGTERM, which the sweep passes on, it saves and stops; when the sweep is killed it dies as
well.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli.terminal import CELL_PROCESS, plain_output
from clipgraft.errors import ClipgraftError, TrainingError

if TYPE_CHECKING:
    from clipgraft.cli.sweep_work import Material
    from clipgraft.train.sweep import Cell, CellResult

log = logging.getLogger("clipgraft")
_REQUESTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """What a cell's process is given.

    Attributes:
        place: the cell's folder.
        specs: the model, data, class, sweep and train specs.
        material: the data, which are read once for all cells.
        towers: those that any cell of the sweep adapts.
    """

    cell: Cell
    place: Path
    specs: Sequence[Any]
    material: Material
    towers: frozenset[str]


def run_apart(job: Job) -> CellResult:
    """Run or resume a cell in its own process.

    Raises:
        SystemExit: the process was killed; with a line on stderr, and the code that shells give for that.
        Whatever the cell raises.
    """
    sys.stdout.flush()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # As bytes, so that the new process is ready for signals before it imports all that they are made of.
    process = context.Process(target=_serve, args=(sender, pickle.dumps(job)), name=CELL_PROCESS)
    with _passing_on(process) as requests, receiver:
        with sender, _held_back():
            process.start()
        kind, value = _receive(receiver)
        if kind == "ready":
            requests.pass_on()
            kind, value = _receive(receiver)
        process.join()
    if kind == "done" and requests.last is not None:  # it came when there was nothing left to stop
        signal.raise_signal(requests.last)
    if kind == "ended":
        number = -(process.exitcode or 0)
        if number > 0:
            name = signal.Signals(number).name
            print(
                f"clipgraft: cell {job.cell.name}: its process was ended by {name} (by hand, or by the "
                "system when memory is short): run the same command again to go on with it",
                file=sys.stderr,
            )
            raise SystemExit(128 + number)
        raise TrainingError(f"cell {job.cell.name}: its process ended with code {process.exitcode}")
    if kind == "raise":
        raise value
    result: CellResult = value
    return result


def _receive(receiver: Connection) -> tuple[str, Any]:
    try:
        kind, value = receiver.recv()
    except EOFError:
        return "ended", None
    return kind, value


class _Requests:
    """Requests to stop, which go on to a process as soon as it can follow them."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self._ready = False
        self.last: int | None = None

    def receive(self, kind: int, _: object) -> None:
        """Handle a signal."""
        self.last = kind
        if self._ready and self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, kind)

    def pass_on(self) -> None:
        """Pass on the request that came before the process was ready, and from now on each at once."""
        self._ready = True
        if self.last is not None:
            self.receive(self.last, None)


@contextlib.contextmanager
def _passing_on(process: BaseProcess) -> Iterator[_Requests]:
    """Send each request to stop on to a process, which ignores them until it says that it is ready."""
    requests = _Requests(process)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {kind: signal.getsignal(kind) for kind in _REQUESTS}
    for kind in _REQUESTS:
        signal.signal(kind, requests.receive)
    try:
        yield requests
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Block SIGINT in a process that is started here, until it unblocks it; here it stays pending."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(sender: Connection, job: bytes) -> None:
    """Run a job in the cell's process, and send the result or the error."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the sweep, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that came to the whole group until now
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    sender.send(("ready", None))
    answer: tuple[str, object]
    try:
        answer = ("done", _run(pickle.loads(job)))
    except (ClipgraftError, KeyboardInterrupt, OSError) as error:
        answer = ("raise", error)
    except Exception:
        traceback.print_exc()
        answer = ("raise", TrainingError("a cell failed by a fault of clipgraft, which is printed above"))
    with sender:
        sender.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _run(job: Job) -> CellResult:
    """Train or measure a cell, printing like the sweep itself."""
    from clipgraft.cli.common import hand_over, load_model
    from clipgraft.cli.start import attach_adapter
    from clipgraft.cli.sweep_work import work_of
    from clipgraft.models.device import peak_memory
    from clipgraft.train.args import RunArgs
    from clipgraft.train.interrupt import Interrupted
    from clipgraft.train.run_folder import early_lines, started
    from clipgraft.train.sweep import CellResult

    cell, (model_spec, _, _, sweep, train) = job.cell, job.specs
    with plain_output(), early_lines():
        clip, work = load_model(model_spec), work_of(job.material, job.specs)
        if cell.kind == "base":
            metrics = work.validate(clip) | work.tested(clip)
            hand_over(clip, job.place, metrics)
            return CellResult(cell, metrics)
        # Written out, so that an unfinished cell of other epochs is refused and not extended.
        parts = train.epoch_parts or (train.epochs,)
        args = train.replace(seed=cell.seed, epochs=sum(parts), epoch_parts=parts)
        if cell.kind == "full":
            locks = {"lock_image": "vision" not in job.towers, "lock_text": "text" not in job.towers}
            args = args.replace(**locks, lr=sweep.full_lr or train.lr)
        else:
            attach_adapter(clip, sweep.adapter(cell.r, cell.targets), cell.seed)
        folder = job.place / "run"
        try:
            with peak_memory() as peak:
                run = RunArgs(out=folder, resume=started(folder), save_frequency=0, val_frequency=0)
                done = work.fit(clip, args, run)
                high = peak()
        except Interrupted as stop:
            told = Interrupted(f"cell {cell.name}: {stop}; run the same command again to go on")
            told.signal = stop.signal
            raise told from None
        metrics = {name: float(value) for name, value in done.metrics.items() if name != "epoch"}
        metrics |= work.tested(clip)
        hand_over(clip, job.place, metrics, done.base)
        gain = None if done.verdict is None else done.verdict.difference
        return CellResult(cell, metrics, done.trainable, done.bytes, done.seconds, high, gain)
