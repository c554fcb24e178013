"""`lr=auto`: short trainings at several learning rates, judged by the loss on images held out of them.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): every candidate trains for a few steps from
the same weights, with warmup and a cosine that falls to zero as the run's own does; the better half trains
anew for twice as many. The validation data is never looked at.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from clipgraft.data.features import evaluating
from clipgraft.errors import CheckpointError, TrainingError
from clipgraft.files import write_json
from clipgraft.lora.state import lora_state
from clipgraft.models.family import is_lora
from clipgraft.records import Finite, Whole, read_json
from clipgraft.train.feed import Feed, MicroBatch
from clipgraft.train.loop import Loop, running_statistics
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
        """In steps, measuring `held_out` batches after each trial included."""
        measured = 1 + sum(size for size, _ in self.rungs)
        return sum(size * steps for size, steps in self.rungs) + _FORWARD * held_out * measured


def plan_trials(rates: Sequence[float], total_steps: int, held_out: int) -> Plan | None:
    """The longest trials of all rates, else of the middle three, that cost no more than `SHARE` of a run."""
    middle = len(rates) // 2
    for some in (tuple(rates), tuple(rates[middle - 1 : middle + 2])):
        fitting = (
            Plan(some, steps)
            for steps in range(total_steps, _FEWEST_STEPS - 1, -1)
            if Plan(some, steps).cost(held_out) <= SHARE * total_steps
        )
        if (found := next(fitting, None)) is not None:
            return found
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
    whole = any(p.requires_grad and not is_lora(name) for name, p in setup.clip.model.named_parameters())
    adapter = lora_state(setup.clip) is not None or not whole  # a head alone learns as fast as an adapter
    default = ADAPTER_RATE if adapter else MODEL_RATE
    if not setup.world.alone:
        return Rate(default, why="several processes train together; search in one, or give `lr`")
    epoch, total = feed.steps, feed.steps * setup.train.epochs
    held_out = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * epoch)))
    plan = plan_trials(ADAPTER_RATES if adapter else MODEL_RATES, total, held_out) if epoch > 1 else None
    if plan is None:
        return Rate(default, why=f"{SHARE:.0%} of the run's {total:,} steps are too few for trials")
    with _restoring(what.module) as restore:
        trials = _Trials(what, held_out, restore)
        before = trials.loss()
        left: list[float] = list(plan.rates)
        for size, steps in plan.rungs:
            left = sorted(left, key=trials.order)[:size]
            for lr in left:
                trials.run(lr, steps)
        best = min(left, key=trials.order)
    cost = plan.cost(held_out) / total
    return Rate(best, tuple(trials.done), before, trials.pairs, cost)


class _Trials:
    """Trainings from the same weights on the batches that are not held out."""

    def __init__(self, what: Subject, held_out: int, restore: Restore) -> None:
        self.done: list[Trial] = []
        self._what = what
        self._restore = restore
        with contextlib.closing(what.feed.batches(0, 0)) as batches:
            self._held_out = list(islice(batches, held_out))
        ids = [part.image_ids for batch in self._held_out for part in batch]
        self._images = torch.unique(torch.cat(ids))
        self.pairs = sum(map(len, ids))

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
        try:
            trial.trained.train()
            for number, batch in enumerate(islice(self._batches(), steps), 1):
                trial.step(batch, number)
            loss = self.loss()
        except TrainingError as error:
            log.debug("trial at %g: %s", lr, error)
        finally:
            self._restore()
        self.done.append(Trial(lr, steps, loss if loss is not None and math.isfinite(loss) else None))

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """Those of epoch after epoch, without the pairs of held-out images."""
        feed = self._what.feed
        for batch in chain.from_iterable(feed.batches(epoch, 0) for epoch in count()):
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


class Restore:
    """Gives all that trains the values it had when this was made."""

    def __init__(self, trained: nn.Module) -> None:
        self._tensors = [p for p in trained.parameters() if p.requires_grad] + running_statistics(trained)
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def __call__(self) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)
                tensor.grad = None


@contextlib.contextmanager
def _restoring(trained: nn.Module) -> Iterator[Restore]:
    """Weights, statistics and random streams are afterwards as they were."""
    restore = Restore(trained)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield restore
        finally:
            restore()
