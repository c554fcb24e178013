"""`lr=auto`: short trainings at several learning rates, judged by the loss on images held out of them.

Every candidate trains for a few steps from the same weights, with warmup and a cosine that falls to zero as
the run's own does; the best two train anew for several times as many, as in successive halving (Jamieson &
Talwalkar 2016, arXiv:1502.07943). The first candidates are the middle three rates, and one beyond is tried
only where it may be the best: the loss falls with the rate up to some rate and rises from there on. The
validation data is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
_FINAL_STEPS, _FINAL_SHARE = 18, 0.025
"""Of a final trial, at most: so many, or that share of a run's steps. Shorter ones do not see that a rate is
too high (benchmarks/results/defaults.md)."""
_FINALISTS = 2


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
    """Which rates may be tried, and how long a first trial is.

    Attributes:
        rates: in ascending order, at least three.
        steps: of a first trial.
        final: steps of each of the two trials that decide.
    """

    rates: tuple[float, ...]
    steps: int
    final: int

    @property
    def first(self) -> range:
        """Indices of the rates that are tried in any case."""
        middle = len(self.rates) // 2
        return range(middle - 1, middle + 2)

    def cost(self, held_out: int, beyond: int | None = None) -> float:
        """In steps, measuring `held_out` batches before the trials and after each included.

        `beyond` is how many rates beyond the first are tried; the most there may be where it is left out.
        """
        most = min(self.first.start, len(self.rates) - self.first.stop)
        short = len(self.first) + (most if beyond is None else beyond)
        measured = FORWARD * held_out * (1 + short + _FINALISTS)
        return self.steps * short + self.final * _FINALISTS + measured


def plan_trials(rates: Sequence[float], total_steps: int, held_out: int, share: float = SHARE) -> Plan | None:
    """Trials that cost no more than a share of a run: of all rates, or of the middle three in a short run."""
    middle = len(rates) // 2
    wanted = max(_FINAL_STEPS, round(_FINAL_SHARE * total_steps))
    steps = max(FEWEST_STEPS, wanted // 4)
    for some, least in ((tuple(rates), wanted), (tuple(rates[middle - 1 : middle + 2]), 2 * steps)):
        left = share * total_steps - Plan(some, steps, 0).cost(held_out)
        final = min(wanted, int(left / _FINALISTS))
        if final >= least:
            return Plan(some, steps, final)
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
        before = trials.loss()
        short = _short_trials(plan, trials.run)
        finalists = _best_first(short)[:_FINALISTS]
        done = [Trial(lr, plan.final, trials.run(lr, plan.final)) for lr in finalists]
    cost = plan.cost(held_out, beyond=len(short) - len(plan.first)) / total
    return Rate(_best_first(done)[0], (*short, *done), before, trials.pairs, cost)


def _short_trials(plan: Plan, run: Callable[[float, int], float | None]) -> list[Trial]:
    """Try the middle rates, and those beyond as long as the outermost that was tried is the best."""

    def trial(index: int) -> Trial:
        return Trial(plan.rates[index], plan.steps, run(plan.rates[index], plan.steps))

    low, high = plan.first.start, plan.first.stop - 1
    done = [trial(index) for index in plan.first]
    while True:
        best = plan.rates.index(_best_first(done)[0])
        if best == low > 0:
            low -= 1
            done.append(trial(low))
        elif best == high < len(plan.rates) - 1:
            high += 1
            done.append(trial(high))
        else:
            return done


def _best_first(done: Sequence[Trial]) -> list[float]:
    """Sort rates by the loss of their trial; of equals the lower comes first, those that diverged last."""
    ranked = sorted(done, key=lambda trial: (math.inf if trial.loss is None else trial.loss, trial.lr))
    return [trial.lr for trial in ranked]
