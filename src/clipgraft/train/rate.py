"""`lr=auto`: short trainings at several learning rates, judged by the loss on images held out of them.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): every candidate trains for a few steps from
the same weights, with warmup and a cosine that falls to zero as the run's own does; the better half trains
anew for twice as many. The validation data is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipgraft.lora.state import lora_state
from clipgraft.records import Finite, Whole
from clipgraft.train.feed import trains
from clipgraft.train.loop import same_random
from clipgraft.train.trials import FORWARD, LEAST_LEFT, Subject, Trials, chosen_once, held_out_batches

RECORD = "learning_rate.json"
SHARE = 0.15
"""Of the run's steps, which is what the search may cost."""
ADAPTER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MODEL_RATES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3)
ADAPTER_RATE, MODEL_RATE = 3e-4, 1e-5
"""Where nothing can be tried: what few pairs, seen many times, want (benchmarks/results/defaults.md)."""
FEWEST_STEPS = 4
"""Of a first trial: with fewer, warmup is all of it."""


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
        return sum(size * steps for size, steps in self.rungs) + FORWARD * held_out * measured


def plan_trials(rates: Sequence[float], total_steps: int, held_out: int, share: float = SHARE) -> Plan | None:
    """The longest trials of all rates, else of the middle three, that cost no more than a share of a run."""
    middle = len(rates) // 2
    for some in (tuple(rates), tuple(rates[middle - 1 : middle + 2])):
        fixed = Plan(some, 0).cost(held_out)
        a_step = Plan(some, 1).cost(held_out) - fixed
        steps = int((share * total_steps - fixed) / a_step)
        if steps >= FEWEST_STEPS:
            return Plan(some, steps)
    return None


def choose_rate(what: Subject, folder: Path, share: float = SHARE) -> Rate:
    """Find the learning rate of a run that is about to begin, for a share of its steps, and record it.

    A run that is resumed has the rate it had. Weights and random streams are afterwards as they were.

    Raises:
        CheckpointError: the record of a run that is resumed is damaged.
    """
    return chosen_once(what.setup, folder / RECORD, Rate, lambda: _search(what, share))


def _search(what: Subject, share: float) -> Rate:
    setup, feed = what.setup, what.feed
    towers = trains(setup.clip, "vision") or trains(setup.clip, "text")
    whole = towers and lora_state(setup.clip) is None  # a head alone learns as fast as an adapter
    rates, default = (MODEL_RATES, MODEL_RATE) if whole else (ADAPTER_RATES, ADAPTER_RATE)
    if not setup.world.alone:
        return Rate(default, why="several processes train together; search in one, or give `lr`")
    total = feed.steps * setup.train.planned_epochs
    held_out = held_out_batches(feed.steps)
    plan = plan_trials(rates, total, held_out, share)
    if plan is None:
        return Rate(default, why=f"{share:.0%} of the run's {total:,} steps are too few for trials")
    with same_random():
        trials = Trials(what, held_out)
        if trials.left < LEAST_LEFT:
            return Rate(default, why="the images of one batch are too large a part of all, to hold them out")
        before, done = trials.loss(), list[Trial]()
        left: list[float] = list(plan.rates)
        for size, steps in plan.rungs:
            left = _best_first(left, done)[:size]
            done += [Trial(lr, steps, trials.run(lr, steps)) for lr in left]
    best = _best_first(left, done)[0]
    return Rate(best, tuple(done), before, trials.pairs, plan.cost(held_out) / total)


def _best_first(rates: Sequence[float], done: Sequence[Trial]) -> list[float]:
    """Sort rates by the loss of their last trial; those that diverged come last."""
    last = {trial.lr: math.inf if trial.loss is None else trial.loss for trial in done}
    return sorted(rates, key=lambda lr: last.get(lr, 0.0))
