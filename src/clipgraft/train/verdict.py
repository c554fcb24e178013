"""What a run bought: the kept epoch beside the model before the first step, with an interval and advice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from clipgraft.evaluate.bootstrap import Difference, Interval, Measured, compare_outcomes, points
from clipgraft.evaluate.metrics import MEASURED_ON, task_of

Word = Literal["better", "no better", "worse"]
Unit = Literal["pairs", "images", "translations"]
FEWEST_CHANGED = 6
"""Images whose answers must change for any verdict: five that all change one way are chance in 1 of 16."""
_FEW = {"pairs": 2000, "images": 500, "translations": 2000}
_HARDLY = 0.05  # share of the loss
_LOW_LR = 1e-4  # below what adapters learn well with
_LOST = 0.01  # share of the queries
_SAME = 1e-4  # share of the loss


@dataclass(frozen=True)
class Trained:
    """How a run trained, as far as advice depends on it.

    Attributes:
        rows: how many pairs or images it trained on; `unit` says which.
        epochs, lr: of the run.
        roles: of the sites that its adapter has, with their towers; None for full fine-tuning.
        losses: mean loss of the first and of the last epoch.
        lost: how much worse the last epoch is than the kept one, in shares.
    """

    rows: int
    unit: Unit
    epochs: int
    lr: float
    roles: Collection[tuple[str, str]] | None
    losses: tuple[float, float] | None
    lost: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether the kept epoch is better than the model before the first step, on the validation data.

    Attributes:
        word: better or worse where the whole interval of `difference` is above or below zero.
        than: what it is compared with: the base, or the adapter that the run began with.
        epoch: the kept one; None where no training is known.
        before, after: the metrics it is about, as shares.
        by_metric: their differences.
        difference: the mean of them; what `word` goes by.
        chance: what answers in random order reach.
        images: how many images or sentences were resampled, and `changed`: for how many an answer became
            right or wrong.
        advice: what to try next; nothing where that is not known.
    """

    word: Word
    than: str
    epoch: int | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    by_metric: Mapping[str, Interval]
    difference: Interval
    chance: Mapping[str, float]
    images: int
    changed: int
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        numbers = "; ".join(
            f"{name} {100 * self.before[name]:.1f} -> {100 * self.after[name]:.1f} % ({gain})"
            for name, gain in self.by_metric.items()
        )
        chance = " and ".join(dict.fromkeys(f"{100 * share:.2g} %" for share in self.chance.values()))
        level = f"{100 * self.difference.level:g} % intervals over {self._measured}"
        lines = [f"{self.word} than {self.than}: {numbers}; {level}, chance is {chance}"]
        if self.word == "no better":
            lines.append(f"not told from chance: {self._why()}")
        lines += [f"try {advice}" for advice in self.advice]
        return "\n".join(lines)

    @property
    def _measured(self) -> str:
        return f"{self.images:,} {MEASURED_ON[task_of(self.after)]}"

    def _why(self) -> str:
        if self.changed < FEWEST_CHANGED:
            return f"answers changed for {self.changed} of {self._measured}"
        mean = self.difference
        return f"the mean difference lies between {points(mean.low)} and {points(mean.high)} points"


def judge(
    before: Measured,
    after: Measured,
    *,
    than: str,
    epoch: int | None = None,
    trained: Trained | None = None,
) -> Verdict:
    """Compare a model with what it is to be better than; `trained` adds advice on the run that made it."""
    found = compare_outcomes(before.outcomes, after.outcomes)
    word = _word(found)
    return Verdict(
        word=word,
        than=than,
        epoch=epoch,
        before={name: before.metrics[name] for name in found.by_metric},
        after={name: after.metrics[name] for name in found.by_metric},
        by_metric=found.by_metric,
        difference=found.mean,
        chance=dict(after.outcomes.chance),
        images=found.groups,
        changed=found.changed,
        advice=() if trained is None or epoch is None else tuple(advise(word, epoch, trained)),
    )


def _word(found: Difference) -> Word:
    sign = found.mean.sign if found.changed >= FEWEST_CHANGED else 0
    words: dict[int, Word] = {1: "better", 0: "no better", -1: "worse"}
    return words[sign]


def advise(word: Word, epoch: int, trained: Trained) -> Sequence[str]:
    """What to change next, the most promising first."""
    found = []
    early = 2 * epoch <= trained.epochs and trained.lost >= _LOST
    if early:
        told = f"it was best after epoch {epoch} of {trained.epochs}"
        found.append(f"`epochs={epoch}`, or `lr={trained.lr / 3:.1g}`: {told}")
    if word == "better":
        return found
    if trained.losses is not None and not early:
        first, last = trained.losses
        if last > (1 - _HARDLY) * first:
            told = f"the loss hardly fell, {first:.3f} to {last:.3f}"
            factor = 10 if trained.lr < _LOW_LR else 3
            found.append(f"`lr={factor * trained.lr:.1g}` or more `epochs`: {told}")
        elif word == "worse":
            found.append(
                f"`lr={trained.lr / 3:.1g}`: the loss fell from {first:.3f} to {last:.3f} all the same"
            )
    if trained.unit != "translations" and (wider := _wider(trained.roles)) is not None:
        found.append(wider)
    if trained.rows < _FEW[trained.unit]:
        found.append(f"more than {trained.rows:,} {trained.unit}")
    return found


def _wider(roles: Collection[tuple[str, str]] | None) -> str | None:
    """The next larger target set; None where there is none."""
    if roles is None:
        return None
    towers = {tower for tower, _ in roles}
    tower = towers.pop() if len(towers) == 1 else None
    mlp = any(role in ("fc1", "fc2") for _, role in roles)
    name = f"linear-{tower}" if tower and not mlp else "linear"
    if tower is None and mlp:
        return None
    why = "both towers" if name == "linear" and tower else "MLPs too"
    return f"`targets={name}`: {why}"


def nothing_learnt(losses: Sequence[float], steps: int) -> str | None:
    """What the losses of a run say against it; None where they say nothing. `steps` is those of an epoch."""
    if not losses:
        return None
    if max(map(abs, losses)) < 1e-6:
        return (
            "nothing was learnt: the loss was 0.0 at every step, since no pair of a batch had a negative; "
            "give more different images and captions, or a larger `batch_size`"
        )
    if len(losses) > 2 and max(losses) - min(losses) < _SAME * max(map(abs, losses)):
        return (
            f"nothing was learnt: the loss was {losses[-1]:.4f} at every step, as if all images, or all "
            "captions, were one; look at the training data"
        )
    first, last = fmean(losses[:steps]), fmean(losses[-steps:])
    if len(losses) >= 2 * steps and abs(first - last) < _SAME * abs(first):
        return (
            f"nothing was learnt: the mean loss was {first:.4f} in the first epoch and {last:.4f} in the "
            "last; raise `lr`"
        )
    return None
