"""The folder of a run, laid out as open_clip's: params.txt, out.log, checkpoints/, and events beside them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from clipgraft.adapters.folder import refuse_other, save_adapter
from clipgraft.errors import CheckpointError, ConfigError
from clipgraft.files import atomic_path, is_partial, sweep_partial, write_json, write_text
from clipgraft.locks import LOCK, require_free, sole_owner
from clipgraft.lora.state import lora_state, require_lora
from clipgraft.models.clip import Clip
from clipgraft.models.export import save_model
from clipgraft.records import Finite, Whole, checked, parse_json, read_json
from clipgraft.records import shown as shown_value
from clipgraft.shown import ShownFormatter, shown
from clipgraft.train.args import RunArgs
from clipgraft.train.checkpoint import LATEST, Position
from clipgraft.train.trackers import TrackedRun, Trackers, require_installed
from clipgraft.writing import size_of, writing

log = logging.getLogger("clipgraft")
RESULTS = "results.json"
_SECONDS = "seconds.txt"
_BUSY = "wait until it ends, or choose another name"


def refuse_used(path: Path, resume: bool) -> None:
    """Keep a new run out of the folder of another one, and any run out of that of one that is going on.

    Raises:
        BusyError: a process is training there.
        ConfigError: another run has taken a step there, with both ways out; or it holds what no run made.
    """
    require_free(path / LOCK, f"run {path}", _BUSY)
    _refuse_begun(path, resume)


def _refuse_begun(path: Path, resume: bool) -> None:
    if not resume and started(path):
        raise ConfigError(
            f"run {path} exists already: add `resume=True` to continue it, or choose another `out`"
        )
    others = () if _is_run(path) else _others(path)
    if others:
        raise ConfigError(
            f"run {path}: the folder holds what no run of clipgraft made ({min(others)}), and is left as it "
            "is: choose another `out`, or an empty folder"
        )
    refuse_other(path / "adapter")


def _is_run(path: Path) -> bool:
    """Whether a folder bears our record of a run; it is written before all that could replace anything."""
    if started(path) or latest_checkpoint(path).is_file():
        return True
    record = path / "params.json"
    try:
        return record.is_file() and "source" in read_json(record, dict[str, Any], ConfigError, "")
    except (ConfigError, OSError):
        return False


def _others(path: Path) -> list[str]:
    """Names in a folder that are not of a run which was killed as it began."""
    if not path.is_dir():
        return [path.name] if os.path.lexists(path) else []
    left = [item for item in path.iterdir() if item.name != LOCK and not is_partial(item)]
    made = [item for item in left if item.name == "checkpoints" and item.is_dir() and not any(item.iterdir())]
    return [item.name for item in left if item not in made]


def started(path: Path) -> bool:
    """Whether a run began in `path`, be it that it was killed before its first checkpoint."""
    return (path / EVENTS).exists()


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


class _OutLog(logging.FileHandler):
    """A log on a disk that may fill up: what is missing in it is said once, and training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        reason = sys.exc_info()[1]
        if not isinstance(reason, OSError):
            super().handleError(record)
        elif not self.terminator.startswith(" "):
            self.terminator = " \n"
            print(f"{self.baseFilename} lacks lines: {reason.strerror}", file=sys.stderr)


class RunFolder:
    """Writes what a run reports; one instance a run, closed at its end, locked until then.

    A run that goes on from a checkpoint leaves the folder as it is until the checkpoint is accepted, which
    `start` says.
    """

    def __init__(self, args: RunArgs, params: Mapping[str, Any]) -> None:
        path, resume = args.out, args.resume
        require_installed(args.track)
        refuse_used(path, resume)
        self.path = path
        self._args = args
        self.checkpoints = path / "checkpoints"
        self.latest = latest_checkpoint(path)
        self._events = path / EVENTS
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"`out`: cannot make {self.checkpoints}: {error.strerror}") from error
        self._params = params
        self._trackers: Trackers | None = None
        self._summary: dict[str, float] = {}
        self._failed = False
        self._handler: logging.FileHandler | None = None
        self._until_closed = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(sole_owner(path / LOCK, f"run {path}", _BUSY))
            _refuse_begun(path, resume)
            stack.callback(log.setLevel, log.level)
            log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
            if not any(isinstance(handler, MemoryHandler) for handler in log.handlers):
                stack.enter_context(early_lines())
            if not (resume and self.latest.exists()):
                self._accept(stack)
            self._until_closed = stack.pop_all()

    def _accept(self, stack: contextlib.ExitStack) -> None:
        """Make the folder this run's."""
        sweep_partial(self.checkpoints)
        listed = "".join(shown(f"{key}: {value}") + "\n" for key, value in sorted(self._params.items()))
        write_json(self.path / "params.json", _plain(self._params))
        write_text(self.path / "params.txt", listed)
        with writing(self.path / "out.log"):
            self._handler = _OutLog(self.path / "out.log", encoding="utf-8", errors="backslashreplace")
        stack.callback(self._handler.close)
        self._handler.setFormatter(ShownFormatter("%(asctime)s | %(levelname)s | %(message)s"))
        for buffer in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
            buffer.setTarget(self._handler)
            buffer.flush()
            log.removeHandler(buffer)
        log.addHandler(self._handler)
        stack.callback(log.removeHandler, self._handler)

    def start(self, position: Position) -> None:
        """Open the events to go on from `position`; what a killed run wrote after it is forgotten."""
        if self._handler is None:
            self._accept(self._until_closed)
        kept = [event for event in read_events(self._events) if not _is_after(event, position)]
        write_text(self._events, "".join(f"{json.dumps(event)}\n" for event in kept))
        args = self._args
        run = TrackedRun(self.path, args.track_project, self._params, position.step)
        self._trackers = Trackers(args.track, run)

    def event(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line to events.jsonl, and send the same numbers to trackers; `start` comes first."""
        with writing(self._events), self._events.open("a", encoding="utf-8") as events:
            events.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        assert self._trackers is not None
        self._trackers.log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def keep_seconds(self, seconds: float) -> None:
        """Record how long the run took up to its checkpoint, which holds no time so that its bits repeat."""
        write_text(self.path / _SECONDS, f"{seconds:.3f}\n")

    def seconds(self) -> float:
        """Of the run so far, as it was kept; 0 where nothing was, or nothing that can be read."""
        try:
            kept = self.path / _SECONDS
            if kept.exists():
                seconds = float(kept.read_text(encoding="utf-8"))
            else:
                seconds = float(json.loads((self.path / RESULTS).read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0.0
        return seconds if 0 <= seconds < math.inf else 0.0

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write what came of the run, and keep it for the trackers; its seconds are in there from now on."""
        write_json(self.path / RESULTS, _plain(results))
        (self.path / _SECONDS).unlink(missing_ok=True)
        self._summary = {
            key: float(value)
            for key, value in results.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

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
        with self._until_closed:
            if self._trackers is not None:
                self._trackers.close(self._summary, self._failed)
                self._trackers = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = kind is not None
        if kind is not None and self._handler is not None:
            reason = f"{kind.__name__}: {error}"
            record = log.makeRecord(log.name, logging.ERROR, "", 0, reason, (), None)
            log.filter(record)  # what a program adds to its logger rewrites this line as all others
            self._handler.handle(record)
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

    def keep_seconds(self, seconds: float) -> None:
        """Rank 0 keeps its own."""

    def seconds(self) -> float:
        """Rank 0 knows."""
        return 0.0

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


EVENTS = "events.jsonl"
MEASURED = ("train", "val")  # kinds whose every other value is a number


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, each with `kind` and `step`; none where there is no such file.

    Raises:
        CheckpointError: a line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # What follows the last line break is empty, or a line that is being written, or that a kill cut short.
    return [_event(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]


def _event(line: str, where: str) -> dict[str, Any]:
    advice = "delete that line"
    event = parse_json(line, dict[str, Any], where, CheckpointError, advice)
    checked(event.get("step"), Whole, f"{where}: step", CheckpointError, advice)
    kind = event.get("kind")
    if not isinstance(kind, str):
        raise CheckpointError(f"{where}: kind is {shown_value(kind)}, and should be text; {advice}")
    if kind in MEASURED:
        checked({**event, "kind": 0}, dict[str, Finite], where, CheckpointError, advice)
    if kind == "train" and "loss" not in event:
        raise CheckpointError(f"{where}: loss is missing; {advice}")
    return event


@dataclass(frozen=True)
class Saver:
    """Writes into a run folder; `lora_only` leaves out the whole model beside each adapter."""

    clip: Clip
    folder: Path
    lora_only: bool

    def save_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """`checkpoints/epoch_N`: the adapter and, unless `lora_only`, `epoch_N.pt`; or the whole model."""
        target = self.folder / "checkpoints" / f"epoch_{epoch}"
        if lora_state(self.clip) is None:
            save_model(self.clip, target, epoch)
            return
        save_adapter(self.clip, target, metrics, overwrite=True)  # the run folder is ours
        if not self.lora_only:
            self._save_with_base(target.with_name(f"epoch_{epoch}.pt"), epoch)

    def save_final(self, epoch: int, metrics: Mapping[str, float], strength: float = 1.0) -> Path:
        """The epoch that the run keeps: `adapter/`, or where `save_epoch` puts, or has put, its model.

        A model of another strength than trained is none that `save_epoch` has put somewhere.
        """
        if lora_state(self.clip) is not None:
            return save_adapter(self.clip, self.folder / "adapter", metrics, overwrite=True)
        if strength != 1:
            return save_model(self.clip, self.folder / "checkpoints" / f"strength_{strength:g}", epoch)
        folder = self.folder / "checkpoints" / f"epoch_{epoch}"
        file = folder.with_name(f"epoch_{epoch}.pt")
        if not folder.is_dir() and not file.is_file():
            self.save_epoch(epoch, metrics)
        return folder if folder.is_dir() else file

    def _save_with_base(self, path: Path, epoch: int) -> None:
        whole = {
            "epoch": epoch,
            "name": self.folder.name,
            "state_dict": self.clip.model.state_dict(),
            "lora_config": {**asdict(self.clip.source), **require_lora(self.clip).chosen().settings.record()},
        }
        with atomic_path(path, size_of(whole)) as temporary:
            torch.save(whole, temporary)


_CPUINFO = Path("/proc/cpuinfo")


def made_with(clip: Clip) -> dict[str, str]:
    """The machine, and versions of Python and of the packages that compute."""
    library = "open_clip_torch" if clip.family.name == "open_clip" else "transformers"
    packages = ("clipgraft", "torch", library)
    found = {name.removesuffix("_torch"): known for name in packages if (known := _version(name))}
    return {"machine": _machine(clip.device), "python": platform.python_version(), **found}


def _machine(device: torch.device) -> str:
    """The graphics card, or the processor and how many threads torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)} of {os.cpu_count()}"


def _processor() -> str:
    """Its name, where the system tells; else the architecture."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
