"""What a run's evaluations found so far: the model before the first step, and the best epoch.

The record lies in the run folder, so that a run that is resumed measures neither again; the weights of the
best epoch lie beside its other checkpoints.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from clipgraft.errors import CheckpointError
from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.evaluate.metrics import DECISIVE
from clipgraft.files import atomic_path, write_json
from clipgraft.records import Finite, Whole, read_json
from clipgraft.train.checkpoint import LATEST, load_weights
from clipgraft.train.verdict import Trained, Verdict, judge

log = logging.getLogger("clipgraft")
RECORD = "validation.json"
BEST = "best.pt"
BASE = "the base"
STARTED = "the adapter that it began with"
_ORDER = (
    *DECISIVE.values(),
    ("mean_per_class_recall",),
    ("image_to_text_R@5", "text_to_image_R@5"),
    ("image_to_text_R@10", "text_to_image_R@10"),
    ("acc5",),
    ("teacher_cosine",),
)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation as it is recorded: `hits` has a digit, 0 or 1, for every query of a metric."""

    epoch: Whole
    metrics: Mapping[str, Finite]
    hits: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """What a run measured before its first step (`than` says what that was), and its best epoch."""

    than: str = BASE
    before: Evaluated | None = None
    best: Evaluated | None = None


class Validation:
    """The evaluations of one run, in the one process that writes.

    Attributes:
        record: what is known; written when it changes.
        last: the last evaluation of this process.
    """

    def __init__(self, folder: Path, than: str, resume: bool) -> None:
        self._path = folder / RECORD
        self._checkpoints = folder / "checkpoints"
        self.record = Record(than)
        self.last: tuple[int, Measured] | None = None
        if resume and self._path.exists():
            self.record = read_json(
                self._path, Record, CheckpointError, "remove it, and the run goes on without a verdict"
            )

    @property
    def before(self) -> dict[str, float] | None:
        """Metrics before the first step, as far as they are known."""
        return None if self.record.before is None else dict(self.record.before.metrics)

    def begin(self, measured: Measured) -> None:
        """Note what the model reached before the first step."""
        self._write(Record(self.record.than, _evaluated(0, measured), None))

    def add(self, epoch: int, measured: Measured) -> None:
        """Note an epoch whose checkpoint is the latest one; keep its weights if it is the best so far."""
        self.last = epoch, measured
        best = self.record.best
        # Of equals the last one is kept; an epoch that is evaluated again, after a kill, is the best again.
        if best is not None and epoch != best.epoch and _order(measured.metrics) < _order(best.metrics):
            return
        _copy(self._checkpoints / LATEST, self._checkpoints / BEST)
        self._write(Record(self.record.than, self.record.before, _evaluated(epoch, measured)))

    def waited(self, epoch: int) -> int:
        """How many epochs the best one is ago."""
        return 0 if self.record.best is None else epoch - self.record.best.epoch

    def restore(self, trained: nn.Module) -> int | None:
        """Give a model the weights of the best epoch; its number, None if nothing was evaluated."""
        if self.last is None or self.record.best is None:
            return None
        best = self.record.best.epoch
        if best != self.last[0]:
            try:
                load_weights(self._checkpoints / BEST, trained)
            except CheckpointError as error:
                log.warning("epoch %d was the best, but the last one is kept: %s", best, error)
                return self.last[0]
        return best

    def verdict(self, epoch: int | None, trained: Trained, kept: Measured | None = None) -> Verdict | None:
        """The epoch that is kept beside what the run began with; None where one of them is not known.

        `kept` is what the epoch reaches where it was saved otherwise than trained.
        """
        before, kept = self._read(self.record.before), kept or self._measured(epoch)
        if before is None or kept is None or epoch is None:
            return None
        last = self.last[1].metrics if self.last is not None else kept.metrics
        lost = max(kept.metrics[name] - last[name] for name in kept.outcomes.hits)
        told = replace(trained, lost=lost)
        return judge(before, kept, than=self.record.than, epoch=epoch, trained=told)

    def _measured(self, epoch: int | None) -> Measured | None:
        if self.last is not None and epoch == self.last[0]:
            return self.last[1]
        best = self.record.best
        return self._read(best) if best is not None and best.epoch == epoch else None

    def _read(self, noted: Evaluated | None) -> Measured | None:
        """An evaluation as it was; None where its queries are not those of the last one."""
        if noted is None or self.last is None:
            return None
        now = self.last[1].outcomes
        hits = {
            name: np.frombuffer(digits.encode(), np.uint8) == ord("1") for name, digits in noted.hits.items()
        }
        if {n: len(h) for n, h in hits.items()} != {n: len(h) for n, h in now.hits.items()}:
            return None
        return Measured(dict(noted.metrics), Outcomes(hits, now.groups, now.chance))

    def _write(self, record: Record) -> None:
        self.record = record
        write_json(self._path, asdict(record))


def _evaluated(epoch: int, measured: Measured) -> Evaluated:
    hits = {
        name: "".join("1" if hit else "0" for hit in found.tolist())
        for name, found in measured.outcomes.hits.items()
    }
    return Evaluated(epoch, measured.metrics, hits)


def _order(metrics: Mapping[str, float]) -> list[float]:
    """What makes one epoch better than another: first answers, and where they tie those behind them."""
    return [sum(metrics.get(name, 0.0) for name in names) for names in _ORDER]


def _copy(source: Path, target: Path) -> None:
    """The same bytes under another name; a checkpoint is only ever replaced, so that a link will do."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)
