"""`lr=auto`: short trainings at several learning rates, judged by the loss on images held out of them.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): every candidate trains for a few steps from
the same weights, with warmup and a cosine that falls to zero as the run's own does; the better half trains
anew for twice as many. The validation data is never looked at.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from clipgraft.data.features import evaluating
from clipgraft.errors import CheckpointError, TrainingError
from clipgraft.files import write_json
from clipgraft.lora.state import lora_state
from clipgraft.records import Finite, Whole, read_json
from clipgraft.train.feed import Feed, MicroBatch, trains
from clipgraft.train.loop import Loop, running_statistics, same_random
from clipgraft.train.recipes.recipe import Objective
from clipgraft.train.schedule import make_schedule
from clipgraft.train.setup import Setup, make_optimizer

log = logging.getLogger("clipgraft")
RECORD = "learning_rate.json"
SHARE = 0.15
"""Of the run's steps, which is what the search may cost."""
ADAPTER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MODEL_RATES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3)
ADAPTER_RATE, MODEL_RATE = 1e-3, 1e-5
"""Where nothing can be tried: what most papers on LoRA for CLIP, and on its full fine-tuning, train with."""
_HELD_OUT = 0.1  # of an epoch's batches
_MOST_HELD_OUT = 8  # batches
_FEWEST_STEPS = 4  # of a first trial: with fewer, warmup is all of it
_LEAST_LEFT = 0.5  # of all pairs, to train trials on
_FORWARD = 1 / 3  # what a batch costs that is only measured, in steps


@dataclass(frozen=True)
class Trial:
    """One short training: its rate, its steps, and the held-out loss after it; None if it was not finite."""

    lr: Finite
    steps: Whole
    loss: Finite | None


@dataclass(frozen=True)
class Rate:
    """The learning rate of a run, and how it was found.

    Attributes:
        lr: the peak learning rate.
        trials: in the order in which they ran; none where nothing could be tried.
        before: held-out loss of the untrained model.
        held_out: pairs that were held out of the trials; the run itself trains on them.
        cost: of the search, as a share of the run's steps.
        why: what kept the search from being made.
    """

    lr: Finite
    trials: tuple[Trial, ...] = ()
    before: Finite | None = None
    held_out: Whole = 0
    cost: Finite = 0.0
    why: str | None = None

    def __str__(self) -> str:
        if self.why is not None:
            return f"`lr=auto` takes {self.lr:g}, untried: {self.why}"
        longest = {trial.lr: trial for trial in self.trials}
        curve = ", ".join(
            f"{lr:g}: {'diverged' if trial.loss is None else f'{trial.loss:.3f}'} ({trial.steps} steps)"
            for lr, trial in sorted(longest.items())
        )
        return (
            f"`lr=auto` takes {self.lr:g}: loss on {self.held_out:,} training pairs held out, "
            f"{self.before:.3f} before; {curve}; {100 * self.cost:.0f} % of the run's steps"
        )


@dataclass(frozen=True)
class Plan:
    """How many candidates train for how many steps, rung after rung."""

    rates: tuple[float, ...]
    steps: int

    @property
    def rungs(self) -> list[tuple[int, int]]:
        """(candidates, steps of each): half as many train for twice as long, down to two."""
        sizes = [len(self.rates)]
        while sizes[-1] > 2:
            sizes.append((sizes[-1] + 1) // 2)
        return [(size, self.steps * 2**number) for number, size in enumerate(sizes)]

    def cost(self, held_out: int) -> float:
        """In steps, measuring `held_out` batches before the trials and after each included."""
        measured = 1 + sum(size for size, _ in self.rungs)
        return sum(size * steps for size, steps in self.rungs) + _FORWARD * held_out * measured


def plan_trials(rates: Sequence[float], total_steps: int, held_out: int) -> Plan | None:
    """The longest trials of all rates, else of the middle three, that cost no more than `SHARE` of a run."""
    middle = len(rates) // 2
    for some in (tuple(rates), tuple(rates[middle - 1 : middle + 2])):
        fixed = Plan(some, 0).cost(held_out)
        a_step = Plan(some, 1).cost(held_out) - fixed
        steps = int((SHARE * total_steps - fixed) / a_step)
        if steps >= _FEWEST_STEPS:
            return Plan(some, steps)
    return None


@dataclass(frozen=True)
class Subject:
    """What a trial trains: all that trains, the batches, and what a step minimises."""

    setup: Setup
    module: nn.Module
    feed: Feed
    objective: Objective


def choose_rate(what: Subject, folder: Path) -> Rate:
    """Find the learning rate of a run that is about to begin, and record it in its folder.

    A run that is resumed has the rate it had. Weights and random streams are afterwards as they were.

    Raises:
        CheckpointError: the record of a run that is resumed is damaged.
    """
    record, world = folder / RECORD, what.setup.world
    if what.setup.run.resume and world.on_rank0(record.exists):
        rate = world.on_rank0(lambda: read_json(record, Rate, CheckpointError, "start the run again"))
    else:
        rate = _search(what)
        world.on_rank0(lambda: write_json(record, asdict(rate)))
    log.info("%s", rate)
    return rate


def _search(what: Subject) -> Rate:
    setup, feed = what.setup, what.feed
    towers = trains(setup.clip, "vision") or trains(setup.clip, "text")
    whole = towers and lora_state(setup.clip) is None  # a head alone learns as fast as an adapter
    rates, default = (MODEL_RATES, MODEL_RATE) if whole else (ADAPTER_RATES, ADAPTER_RATE)
    if not setup.world.alone:
        return Rate(default, why="several processes train together; search in one, or give `lr`")
    total = feed.steps * setup.train.epochs
    held_out = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * feed.steps)))
    plan = plan_trials(rates, total, held_out)
    if plan is None:
        return Rate(default, why=f"{SHARE:.0%} of the run's {total:,} steps are too few for trials")
    with same_random():
        trials = _Trials(what, held_out)
        if trials.left < _LEAST_LEFT:
            return Rate(default, why="the images of one batch are too large a part of all, to hold them out")
        before = trials.loss()
        left: list[float] = list(plan.rates)
        for size, steps in plan.rungs:
            left = sorted(left, key=trials.order)[:size]
            for lr in left:
                trials.run(lr, steps)
    best = min(left, key=trials.order)
    return Rate(best, tuple(trials.done), before, trials.pairs, plan.cost(held_out) / total)


class _Trials:
    """Trainings from the same weights on the batches that are not held out.

    Attributes:
        done: the trials so far.
        pairs: how many are held out.
        left: the share of all pairs whose images are not.
    """

    def __init__(self, what: Subject, held_out: int) -> None:
        self.done: list[Trial] = []
        self._what = what
        with contextlib.closing(what.feed.batches(0, 0)) as batches:
            self._held_out = list(islice(batches, held_out))
        ids = [part.image_ids for batch in self._held_out for part in batch]
        self._images = torch.unique(torch.cat(ids))
        self.pairs = sum(map(len, ids))
        self.left = 1 - float(torch.isin(what.feed.image_of_row, self._images).float().mean())

    def order(self, lr: float) -> float:
        """What candidates are sorted by: the loss of their last trial, infinite where it diverged."""
        losses = [trial.loss for trial in self.done if trial.lr == lr]
        return 0.0 if not losses else math.inf if losses[-1] is None else losses[-1]

    def run(self, lr: float, steps: int) -> None:
        """Train for some steps, and note the held-out loss."""
        what = self._what
        args = what.setup.train.replace(lr=lr)
        warmup = min(args.warmup, max(1, steps // 10))
        trial = Loop(
            setup=replace(what.setup, train=args),
            trained=what.module,
            feed=what.feed,
            objective=what.objective,
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
        self.done.append(Trial(lr, steps, loss if loss is not None and math.isfinite(loss) else None))

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
        objective, total = self._what.objective, 0.0
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
