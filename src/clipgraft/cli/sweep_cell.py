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
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli.terminal import plain_output
from clipgraft.errors import ClipgraftError, TrainingError
from clipgraft.processes import (
    REQUESTS,
    die_with_parent,
    leave_terminal,
    let_signals_in,
    process_name,
    start_unsignalled,
)

if TYPE_CHECKING:
    from clipgraft.cli.flags.shared import ModelFlags
    from clipgraft.cli.flags.training import SweepFlags
    from clipgraft.cli.training_data import ClassData, PairData
    from clipgraft.data.args import FeatureArgs
    from clipgraft.train.args import TrainArgs
    from clipgraft.train.sweep import Cell, CellResult

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class Job:
    """What the cells of a sweep share; `data` are read once for all, and any of them adapts `towers`."""

    model: ModelFlags
    sweep: SweepFlags
    train: TrainArgs
    data: PairData | ClassData
    features: FeatureArgs
    towers: frozenset[str]


def run_apart(job: Job, cell: Cell, place: Path) -> CellResult:
    """Run or resume a cell, whose folder is `place`, in its own process.

    Raises:
        SystemExit: the process was killed; with a line on stderr, and the code that shells give for that.
        Whatever the cell raises.
    """
    sys.stdout.flush()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # As bytes, so that the new process is ready for signals before it imports all that they are made of.
    process = context.Process(
        target=_serve, args=(sender, pickle.dumps((job, cell, place))), name=process_name("sweep cell")
    )
    with _passing_on(process) as requests, receiver:
        with sender:
            start_unsignalled(process)
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
                f"clipgraft: cell {cell.name}: its process was ended by {name} (by hand, or by the "
                "system when memory is short): run the same command again to go on with it",
                file=sys.stderr,
            )
            raise SystemExit(128 + number)
        raise TrainingError(f"cell {cell.name}: its process ended with code {process.exitcode}")
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
    before = {kind: signal.getsignal(kind) for kind in REQUESTS}
    for kind in REQUESTS:
        signal.signal(kind, requests.receive)
    try:
        yield requests
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _serve(sender: Connection, job: bytes) -> None:
    """Run a job in the cell's process, and send the result or the error."""
    leave_terminal()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that came to the whole group until now
    signal.signal(signal.SIGINT, signal.default_int_handler)
    let_signals_in()
    die_with_parent()
    sender.send(("ready", None))
    answer: tuple[str, object]
    try:
        answer = ("done", _run(*pickle.loads(job)))
    except (ClipgraftError, KeyboardInterrupt, OSError) as error:
        answer = ("raise", error)
    except Exception:
        traceback.print_exc()
        answer = ("raise", TrainingError("a cell failed by a fault of clipgraft, which is printed above"))
    with sender:
        sender.send(answer)


def _run(job: Job, cell: Cell, place: Path) -> CellResult:
    """Train or measure a cell, printing like the sweep itself."""
    from clipgraft.cli.common import attach_adapter, hand_over, load_model
    from clipgraft.models.device import peak_memory
    from clipgraft.train.args import RunArgs
    from clipgraft.train.loop import Interrupted
    from clipgraft.train.run import run_recipe
    from clipgraft.train.run_folder import early_lines, started
    from clipgraft.train.sweep import CellResult

    sweep, train, data, features = job.sweep, job.train, job.data, job.features
    with plain_output(), early_lines():
        clip = load_model(job.model)
        if cell.kind == "base":
            metrics = data.validate(clip, features) | data.tested(clip, features)
            hand_over(clip, place, metrics)
            return CellResult(cell, metrics)
        # Written out, so that an unfinished cell of other epochs is refused and not extended.
        parts = train.for_pairs(data.rows).parts
        args = train.replace(seed=cell.seed, epochs=sum(parts), epoch_parts=parts)
        if cell.kind == "full":
            locks = {"lock_image": "vision" not in job.towers, "lock_text": "text" not in job.towers}
            args = args.replace(**locks, lr=sweep.full_lr or train.lr)
        else:
            attach_adapter(clip, sweep.adapter(cell.r, cell.targets), cell.seed)
        folder = place / "run"
        try:
            with peak_memory() as peak:
                frequencies = {"save_frequency": 0, "val_frequency": 0}
                run = RunArgs(out=folder, resume=started(folder), strength="none", **frequencies)
                done = run_recipe(clip, data.recipe(), args, run, features)
                high = peak()
        except Interrupted as stop:
            told = Interrupted(f"cell {cell.name}: {stop}; run the same command again to go on")
            told.signal = stop.signal
            raise told from None
        metrics = {name: float(value) for name, value in done.metrics.items() if name != "epoch"}
        metrics |= data.tested(clip, features)
        hand_over(clip, place, metrics, done.base)
        gain = None if done.verdict is None else done.verdict.difference
        return CellResult(cell, metrics, done.trainable, done.bytes, done.seconds, high, gain)
