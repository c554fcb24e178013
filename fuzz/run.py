"""Run one reader on many damaged files, in its own process, and count the outcomes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

from clipgraft.errors import ClipgraftError
from fuzz.subject import Subject

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))  # for one input
_SILENT = 60.0  # seconds without an input done: stuck in C, where no alarm reaches
_MEMORY = 6 << 30  # bytes that a process may take beyond what it has
_EXAMPLES = 4


class Hang(BaseException):
    """Raised when an input takes too long; an `except Exception` of a reader does not catch it."""


@dataclass
class Count:
    """Counts of outcomes for one reader."""

    reader: str
    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    tracebacks: int = 0
    nameless: int = 0
    not_one_line: int = 0
    hangs: int = 0
    crashes: int = 0
    touched: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return self.tracebacks + self.nameless + self.not_one_line + self.hangs + self.crashes + self.touched

    def note(self, number: int, what: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{self.reader} #{number}: {what}"[:600])


def try_one(subject: Subject, count: Count, number: int, seed: int) -> None:
    """Damage a file, read it, count the outcome, and restore everything."""
    rng = Random(f"{seed} {count.reader} {number}")
    rng.choice(subject.breaks)(rng)
    count.inputs += 1
    try:
        with _alarm():
            subject.read()
        count.accepted += 1
    except Hang:
        count.hangs += 1
        count.note(number, f"took more than {SECONDS:g} s")
    except ClipgraftError as error:
        _judge(subject, count, number, str(error))
    except Exception as error:
        count.tracebacks += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "clipgraft" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        count.note(
            number, f"{type(error).__name__}: {error} at {where} {Path(frame.filename).name}:{frame.lineno}"
        )
    if not subject.untouched():
        count.touched += 1
        count.note(number, "something outside of the folder was changed")
    subject.restore()


def _judge(subject: Subject, count: Count, number: int, message: str) -> None:
    if "\n" in message:
        count.not_one_line += 1
        count.note(number, f"several lines: {message!r}")
    elif not any(name in message for name in (str(subject.folder), *subject.names)):
        count.nameless += 1
        count.note(number, f"names no file: {message!r}")
    else:
        count.refused += 1


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """Set the alarm, silence libraries, and use caches of our own."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    log = logging.getLogger("clipgraft")
    level, log.disabled = log.level, True
    places = {"CLIPGRAFT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    try:
        with mock.patch.dict(os.environ, places), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.signal(signal.SIGALRM, before)
        log.disabled = False
        log.setLevel(level)


def fuzz_here(
    name: str, inputs: int, seed: int, folder: Path, first: int = 0, told: Path | None = None
) -> Count:
    """Fuzz one reader in this process; the counts so far are kept in the file `told`."""
    from fuzz.readers import READERS

    count, began = Count(name), time.monotonic()
    with prepared(folder):
        subject = READERS[name](_made(folder / "work") / "files")
        subject.keep()
        subject.read()
        subject.restore()
        for number in range(first, inputs):
            try_one(subject, count, number, seed)
            if told is not None:
                told.write_text(json.dumps({"next": number + 1, **asdict(count)}))
    count.seconds = time.monotonic() - began
    return count


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def fuzz_apart(name: str, inputs: int, seed: int) -> Count:
    """Fuzz one reader in a process of its own, started again after an input that ends or blocks it."""
    total, first, began = Count(name), 0, time.monotonic()
    while first < inputs:
        with tempfile.TemporaryDirectory() as place:
            told = Path(place) / "told.json"
            told.write_text("{}")
            command = [
                sys.executable,
                "-m",
                "fuzz",
                "--child",
                name,
                str(inputs),
                str(seed),
                str(first),
                place,
            ]
            stuck = _wait(command, told)
            known = json.loads(told.read_text() or "{}")
        first = known.pop("next", first)
        _add(total, Count(**known) if known else Count(name))
        if first < inputs:
            total.inputs += 1
            total.hangs += stuck
            total.crashes += not stuck
            total.note(first, "stood still in C" if stuck else "ended the process")
            first += 1
    total.seconds = time.monotonic() - began
    return total


def child(name: str, inputs: int, seed: int, first: int, folder: Path) -> None:
    """Run as the process of `fuzz_apart`."""
    from fuzz.readers import READERS  # imports torch, which takes address space of its own

    assert name in READERS
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + _MEMORY, own + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fuzz_here(name, inputs, seed, folder, first, folder / "told.json")


def _wait(command: list[str], told: Path) -> bool:
    """Run a command until it ends or hangs; returns whether it hung."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                _, said = process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                if time.time() - told.stat().st_mtime < _SILENT:
                    continue
                process.kill()
                process.communicate()
                return True
            if process.returncode > 0 and "Traceback" in said:  # a fault of the harness
                raise RuntimeError(said[-3000:])
            return False


def _add(total: Count, more: Count) -> None:
    for name, value in asdict(more).items():
        if isinstance(value, int | float) and name != "seconds":
            setattr(total, name, getattr(total, name) + value)
    total.examples += more.examples[: _EXAMPLES - len(total.examples)]
