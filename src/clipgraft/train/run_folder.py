"""The folder of a run, laid out as open_clip's: params.txt, out.log, checkpoints/, and events beside them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clipgraft.errors import ConfigError
from clipgraft.files import sweep_partial, write_json, write_text
from clipgraft.train.checkpoint import LATEST, Position
from clipgraft.train.events import EVENTS, read_events

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

log = logging.getLogger("clipgraft")


def refuse_used(path: Path, resume: bool) -> None:
    """Keep a new run out of the folder of another one that has taken a step.

    Raises:
        ConfigError: with both ways out.
    """
    if not resume and (path / EVENTS).exists():
        raise ConfigError(
            f"run {path} exists already: add --resume latest to continue it, or choose another --name"
        )


def latest_checkpoint(path: Path) -> Path:
    """Where the run in `path` keeps the checkpoint that it goes on from."""
    return path / "checkpoints" / LATEST


@contextlib.contextmanager
def early_lines() -> Iterator[None]:
    """Keep what is logged before the run folder exists; its out.log begins with it."""
    buffer = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    log.addHandler(buffer)
    try:
        yield
    finally:
        log.removeHandler(buffer)
        buffer.close()


class RunFolder:
    """Writes what a run reports; one instance a run, closed at its end."""

    def __init__(self, path: Path, params: Mapping[str, Any], resume: bool) -> None:
        refuse_used(path, resume)
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.latest = latest_checkpoint(path)
        self._events = path / EVENTS
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--logs: cannot make {self.checkpoints}: {error.strerror}") from error
        sweep_partial(self.checkpoints)
        write_text(path / "params.txt", "".join(f"{key}: {value}\n" for key, value in sorted(params.items())))
        write_json(path / "params.json", _plain(params))
        self._handler = logging.FileHandler(path / "out.log", encoding="utf-8", errors="backslashreplace")
        self._handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        for buffer in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
            buffer.setTarget(self._handler)
            buffer.flush()
            log.removeHandler(buffer)
        log.addHandler(self._handler)
        self._level = log.level
        log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
        self._board: SummaryWriter | None = None

    def start(self, position: Position) -> None:
        """Open the events to go on from `position`; what a killed run wrote after it is forgotten."""
        from torch.utils.tensorboard.writer import SummaryWriter

        kept = [event for event in read_events(self._events) if not _is_after(event, position)]
        write_text(self._events, "".join(f"{json.dumps(event)}\n" for event in kept))
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=position.step + 1)

    def event(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line to events.jsonl and the same numbers to TensorBoard; `start` comes first."""
        with self._events.open("a", encoding="utf-8") as events:
            events.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        assert self._board is not None
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def history(self) -> list[dict[str, float]]:
        """Metrics of every evaluated epoch of the run, those before a resume included; not of epoch 0."""
        return [
            {name: value for name, value in event.items() if name not in ("kind", "step")}
            for event in read_events(self._events)
            if event["kind"] == "val" and event["step"] > 0
        ]

    def losses(self) -> list[float]:
        """The loss of every step of the run, those before a resume included."""
        return [float(event["loss"]) for event in read_events(self._events) if event["kind"] == "train"]

    def close(self) -> None:
        log.setLevel(self._level)
        log.removeHandler(self._handler)
        self._handler.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            reason = f"{kind.__name__}: {error}"
            self._handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, reason, (), None))
        self.close()


@dataclass(frozen=True)
class SilentFolder:
    """A run folder to a process that does not write: everything is where it is, and nothing is done."""

    path: Path

    @property
    def latest(self) -> Path:
        return latest_checkpoint(self.path)

    def start(self, position: Position) -> None:
        """Nothing to open."""

    def event(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 reports the same."""

    def __enter__(self) -> SilentFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def _plain(value: Any) -> Any:
    """What JSON can hold: paths, and whatever else it does not know, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _is_after(event: Mapping[str, Any], position: Position) -> bool:
    """Whether a run at `position` writes the event (again). Epochs are evaluated after their last step.

    What the model reaches before the first step is reported again by a run that begins there.
    """
    if event["step"] == position.step and event["kind"] == "val":
        return position.step_in_epoch > 0 or position.step == 0
    return bool(event["step"] > position.step)
