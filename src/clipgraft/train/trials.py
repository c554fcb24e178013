"""Short trainings from the weights that a run begins with, judged on pairs that are held out of them.

They find what a run is not told: its learning rate (`train.rate`) and how much what is retained counts
(`train.retention`). The validation data is never looked at, and everything is afterwards as it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipgraft.data.features import evaluating
from clipgraft.errors import CheckpointError, TrainingError
from clipgraft.files import write_json
from clipgraft.records import read_json
from clipgraft.results import plain
from clipgraft.train.feed import Feed, MicroBatch
from clipgraft.train.loop import Loop, running_statistics
from clipgraft.train.recipes.recipe import Objective
from clipgraft.train.schedule import make_schedule
from clipgraft.train.setup import Setup, make_optimizer

log = logging.getLogger("clipgraft")
_HELD_OUT = 0.1  # of an epoch's batches
_MOST_HELD_OUT = 8  # batches
LEAST_LEFT = 0.5
"""Of all pairs, to train trials on."""
FORWARD = 1 / 3
"""What a batch costs that is only measured, in steps."""


_Found = TypeVar("_Found")


def chosen_once(setup: Setup, record: Path, kind: type[_Found], search: Callable[[], _Found]) -> _Found:
    """Search for what a run is not told, and record and log it; a run that is resumed has what it had.

    Raises:
        CheckpointError: the record of a run that is resumed is damaged.
    """
    world = setup.world
    if setup.run.resume and world.on_rank0(record.exists):
        found = world.on_rank0(lambda: read_json(record, kind, CheckpointError, "start the run again"))
    else:
        found = search()
        world.on_rank0(lambda: write_json(record, plain(found)))
    log.info("%s", found)
    return found


def held_out_batches(steps: int) -> int:
    """How many batches of an epoch of so many steps are held out."""
    return min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * steps)))


@dataclass(frozen=True)
class Subject:
    """What a trial trains: all that trains, the batches, what a step minimises, and the loss that judges.

    `task` is the objective without what the model is held to, the same as `objective` where that is nothing.
    """

    setup: Setup
    module: nn.Module
    feed: Feed
    objective: Objective
    task: Objective


class Trials:
    """Trainings from the same weights on the batches that are not held out.

    Attributes:
        pairs: how many are held out.
        left: the share of all pairs whose images are not.
    """

    def __init__(self, what: Subject, held_out: int) -> None:
        self._what = what
        with contextlib.closing(what.feed.batches(0, 0)) as batches:
            self._held_out = list(islice(batches, held_out))
        ids = [part.image_ids for batch in self._held_out for part in batch]
        self._images = torch.unique(torch.cat(ids))
        self.pairs = sum(map(len, ids))
        self.left = 1 - float(torch.isin(what.feed.image_of_row, self._images).float().mean())

    def run(self, lr: float, steps: int, objective: Objective | None = None) -> float | None:
        """Train for some steps; the loss of the task on what is held out, None if it was not finite.

        `objective` takes the place of the run's own.
        """
        what = self._what
        args = what.setup.train.replace(lr=lr)
        warmup = min(args.warmup, max(1, steps // 10))
        trial = Loop(
            setup=replace(what.setup, train=args),
            trained=what.module,
            feed=what.feed,
            objective=objective or what.objective,
            optimizer=make_optimizer(what.module, args),
            schedule=make_schedule("cosine", lr, warmup, steps),
        )
        loss: float | None = None
        with _restored(what.module), contextlib.closing(self._batches()) as batches:
            try:
                what.module.train()
                for number, batch in enumerate(islice(batches, steps), 1):
                    trial.step(batch, number)
                loss = self.loss()
            except TrainingError as error:
                log.debug("trial at %g: %s", lr, error)
        return loss if loss is not None and math.isfinite(loss) else None

    def _batches(self) -> Generator[list[MicroBatch], None, None]:
        """Those of epoch after epoch, without the pairs of held-out images."""
        for epoch in count():
            with contextlib.closing(self._what.feed.batches(epoch, 0)) as batches:
                for batch in batches:
                    kept = [_without(part, self._images) for part in batch]
                    if kept := [part for part in kept if len(part.image_ids) > 1]:
                        yield kept

    def loss(self) -> float:
        """Mean of the held-out batches, by the model as it is."""
        objective, total = self._what.task, 0.0
        torch.manual_seed(self._what.setup.train.seed)
        with evaluating(self._what.setup.clip), torch.no_grad():
            for batch in self._held_out:
                parts = [encode() for encode in objective.parts(batch)]
                images, texts = (torch.cat(tower) for tower in zip(*parts, strict=True))
                total += float(objective.loss(batch)(images, texts))
        return total / len(self._held_out)


def _without(part: MicroBatch, images: Tensor) -> MicroBatch:
    keep = ~torch.isin(part.image_ids, images)
    pixels = None if part.pixels is None else part.pixels[keep]
    return MicroBatch(part.image_ids[keep], part.caption_ids[keep], pixels, part.turns[keep])


@contextlib.contextmanager
def _restored(trained: nn.Module) -> Iterator[None]:
    """All that trains has afterwards the values it had, and no gradient."""
    tensors = [p for p in trained.parameters() if p.requires_grad] + running_statistics(trained)
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
                tensor.grad = None
