"""Send the numbers of a run to TensorBoard, Weights & Biases, MLflow and Trackio.

Each tracker has a thread of its own: one that is slow, fails, or cannot be reached neither holds up a run nor
ends it. What a tracker does not take is said once; `events.jsonl` has every number in any case.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from clipgraft.errors import ConfigError
from clipgraft.files import write_json
from clipgraft.records import read_json
from clipgraft.shown import shown_line
from clipgraft.writing import writing

log = logging.getLogger("clipgraft")
_PATIENCE = 30.0  # seconds that a run waits at its end for a tracker
_INIT_SECONDS, _LOGIN_SECONDS = 30, 60  # that wandb waits for its server, and for a key to be typed
_LONGEST = 500  # characters of a setting; MLflow refuses longer ones
_PARAMS_A_BATCH = 100  # MLflow's limit
_IDS = "trackers.json"


class Tracker(Protocol):
    """An opened run at one tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of one step, by names such as `train/loss`."""

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        """End the run there; `summary` is what came of it."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        folder: of the run; its name is the run's.
        project: of the run; MLflow's experiment.
        params: the settings.
        step: that the run begins, or goes on, after.
    """

    folder: Path
    project: str
    params: Mapping[str, Any]
    step: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values, others as text."""
        plain = (bool, int, float, str)
        return {
            key: value if value is None or isinstance(value, plain) else json.dumps(value, default=str)
            for key, value in self.params.items()
        }

    def known_id(self, tracker: str) -> str | None:
        """The id that a tracker gave this run before; None for a run that begins."""
        return self._ids().get(tracker) if self.step else None

    def keep_id(self, tracker: str, given: str) -> None:
        """Record the id for a resume."""
        write_json(self.folder / _IDS, {**self._ids(), tracker: given})

    def _ids(self) -> dict[str, str]:
        path = self.folder / _IDS
        return read_json(path, dict[str, str]) if path.is_file() else {}


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = run.folder / "tensorboard"
        with writing(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=run.step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        with writing(self._folder):
            self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.known_id("wandb"),
            resume="allow",
            dir=run.folder,
            config=run.settings,
            settings=wandb.Settings(console="off", init_timeout=_INIT_SECONDS, login_timeout=_LOGIN_SECONDS),
        )
        run.keep_id("wandb", self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """Through a client, since MLflow's own functions keep one run a thread."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = run.known_id("mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self._id = self._client.create_run(number, run_name=run.folder.name).info.run_id
        run.keep_id("mlflow", self._id)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in run.settings.items()]
        for start in range(0, len(params), _PARAMS_A_BATCH):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_A_BATCH])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(_for_mlflow(name), value, now, step) for name, value in values.items()]
        )

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        for name, value in summary.items():
            self._client.log_metric(self._id, _for_mlflow(name), value)
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _for_mlflow(name: str) -> str:
    """Replace what MLflow refuses in a name: `R@1` -> `R_at_1`."""
    return re.sub(r"[^\w\-./ :]", "_", name.replace("@", "_at_"))


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        known = run.known_id("trackio")
        self._run = trackio.init(
            project=run.project,
            name=known or run.folder.name,
            resume="never" if known is None else "allow",
            config=run.settings,
            embed=False,
        )
        run.keep_id("trackio", self._run.name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        if summary:
            self._run.log(dict(summary))
        self._run.finish()


@dataclass(frozen=True)
class Kind:
    """A tracker that can be named.

    Attributes:
        module: what must be installed.
        open: opens a run there; may raise anything.
        may_ask: whether that may ask for a key in the terminal, which a thread cannot.
    """

    module: str
    open: Callable[[TrackedRun], Tracker]
    may_ask: bool = False


KINDS: Mapping[str, Kind] = {
    "tensorboard": Kind("tensorboard", _TensorBoard),
    "wandb": Kind("wandb", _Wandb, may_ask=True),
    "mlflow": Kind("mlflow", _MLflow),
    "trackio": Kind("trackio", _Trackio),
}


def require_installed(names: Sequence[str]) -> None:
    """Raise ConfigError where a tracker that is asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(KINDS[name].module) is None:
            raise ConfigError(f"`track={name}` needs {name}: pip install 'clipgraft[{name}]'")


class Trackers:
    """The trackers of one run; closed at its end."""

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._senders = [_Sender(name, KINDS[name], run) for name in names]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand the values of one step to every tracker, which takes them in its own time."""
        for sender in self._senders:
            sender.put(lambda tracker: tracker.log(values, step))

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        """End the run at every tracker, and wait for them, together no longer than `_PATIENCE`."""
        for sender in self._senders:
            sender.end(summary, failed)
        until = time.monotonic() + _PATIENCE
        for sender in self._senders:
            sender.wait(max(0.0, until - time.monotonic()))


_Send = Callable[[Tracker], None]


class _Sender:
    """One tracker in a thread; what comes after its first failure is counted and dropped."""

    def __init__(self, name: str, kind: Kind, run: TrackedRun) -> None:
        self._name = name
        self._waiting: SimpleQueue[_Send | None] = SimpleQueue()
        self._failed = False
        self._tracker: Tracker | None = None
        self._open: Callable[[], Tracker] = partial(kind.open, run)
        if kind.may_ask:
            self._try(self._opened)
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, send: _Send) -> None:
        if not self._failed:
            self._waiting.put(send)

    def end(self, summary: Mapping[str, float], failed: bool) -> None:
        self.put(lambda tracker: tracker.close(summary, failed))
        self._waiting.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning(
                "%s: has not taken the last %d of this run's reports, and is waited for no longer; "
                "events.jsonl has them",
                self._name,
                self._waiting.qsize(),
            )

    def _work(self) -> None:
        if self._tracker is None:
            self._try(self._opened)
        while (send := self._waiting.get()) is not None:
            tracker = self._tracker
            if tracker is not None and not self._failed:
                self._try(partial(send, tracker))

    def _opened(self) -> None:
        self._tracker = self._open()

    def _try(self, run: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            run()
        except (Exception, SystemExit) as error:
            self._failed = True
            with suppress(ValueError):  # the log may be closed by then
                reason = shown_line(f"{type(error).__name__}: {error}", 200)
                log.warning(
                    "%s: %s; the run goes on without it, and events.jsonl has every number",
                    self._name,
                    reason,
                )
