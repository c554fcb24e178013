"""Intervals for the difference between two models on the same queries, by a paired bootstrap.

Both models answer the same queries, so that only queries that one of them answers and the other does not say
anything. Captions of one image are not independent of each other, nor is an image of its captions: what is
drawn with replacement is therefore a group, an image with all its queries (a cluster bootstrap; Efron and
Tibshirani 1993, *An Introduction to the Bootstrap*, chapters 8 and 13). The gallery stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipgraft.errors import DataError
from clipgraft.text_tables import signed

RESAMPLES = 5000
LEVEL = 0.95
_NUMBERS = 2**22  # held at once while resampling
Values = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies with a probability of `level`; shares, not percent."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{points(self.value)}, {points(self.low)} to {points(self.high)}"


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What every query of an evaluation got.

    Attributes:
        hits: by metric, one number a query: 1 where the right answer came first, else 0. Their mean is the
            metric.
        groups: by metric, the number of the group (image) that each query belongs to.
        chance: by metric, what answers in random order reach.
    """

    hits: Mapping[str, Values]
    groups: Mapping[str, Values]
    chance: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Measured:
    """One evaluation: its numbers, and what every query got."""

    metrics: dict[str, float]
    outcomes: Outcomes


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another, in shares: 0.01 is one point.

    Attributes:
        mean: of all metrics together.
        by_metric: of each.
        groups: how many images there are.
        changed: how many of them have a query whose answer became right or wrong.
    """

    mean: Interval
    by_metric: Mapping[str, Interval]
    groups: int
    changed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def points(share: float) -> str:
    """0.0312 -> +3.1"""
    return signed(100 * share)


def compare_outcomes(before: Outcomes, after: Outcomes, *, seed: int = 0) -> Difference:
    """The gain from `before` to `after` on the same queries, with percentile bootstrap intervals.

    Args:
        before, after: of two models on the same data.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        DataError: the two are not of the same queries.
    """
    names = list(after.hits)
    if before.hits.keys() != after.hits.keys() or not names:
        raise DataError("the two evaluations have other metrics: compare models on the same task")
    for name in names:
        if len(before.hits[name]) != len(after.hits[name]):
            raise DataError(
                f"{name} is of {len(before.hits[name])} queries before and {len(after.hits[name])} after: "
                "compare models on the same data"
            )
    gains = [np.asarray(after.hits[n], float) - np.asarray(before.hits[n], float) for n in names]
    owners = [np.asarray(after.groups[n]) for n in names]
    means, found = bootstrap_means(gains, owners, seed=seed)
    moved = np.concatenate([owner[gain != 0] for gain, owner in zip(gains, owners, strict=True)])
    return Difference(
        mean=means,
        by_metric=dict(zip(names, found, strict=True)),
        groups=len(np.unique(np.concatenate(owners))),
        changed=len(np.unique(moved)),
    )


def bootstrap_means(
    values: Sequence[Values], groups: Sequence[Values], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, list[Interval]]:
    """Percentile intervals of some means that share their groups, and of the mean of these means.

    Args:
        values: for each of M columns, floating (n,): one number a query; columns may differ in length.
        groups: for each column, integer (n,): the group of each query, which is drawn as a whole.
        resamples: how often as many groups as there are are drawn with replacement.
        seed: of the draws.

    Returns:
        The interval of the mean of all columns, and that of each.

    Raises:
        DataError: a column is empty, or its values and groups differ in number.
    """
    columns = len(values)
    if not columns or any(len(v) == 0 or len(v) != len(g) for v, g in zip(values, groups, strict=True)):
        raise DataError("no query to resample: give each column one value and one group a query")
    places = np.unique(np.concatenate(groups), return_inverse=True)[1].reshape(-1)
    owner = np.split(places, np.cumsum([len(column) for column in values])[:-1])
    size = int(places.max()) + 1
    sums = [np.bincount(own, weights=v, minlength=size) for own, v in zip(owner, values, strict=True)]
    counts = [np.bincount(own, minlength=size) for own in owner]
    rows = np.stack([*sums, *counts], axis=1).astype(float)  # (groups, 2 M)
    drawn = np.concatenate([*_resampled(rows, resamples, np.random.default_rng(seed))])  # (resamples, 2 M)
    total = rows.sum(0)
    estimate = total[:columns] / total[columns:]
    with np.errstate(invalid="ignore"):  # a draw may hold no query of a column
        means = drawn[:, :columns] / drawn[:, columns:]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.nanquantile(np.column_stack([means, means.mean(1)]), tails, axis=0)
    found = [
        Interval(float(v), float(a), float(b))
        for v, a, b in zip([*estimate, estimate.mean()], low, high, strict=True)
    ]
    return found[-1], found[:-1]


def _resampled(rows: Values, resamples: int, random: np.random.Generator) -> Iterator[Values]:
    """Sums over the groups of each draw, (resamples, columns) in blocks.

    Groups that are alike are exchangeable: how often each kind is drawn is multinomial. Hits have few kinds,
    so that the work hardly grows with the number of queries.
    """
    kinds, number = np.unique(rows, axis=0, return_counts=True)
    size = len(rows)
    by_kind = len(kinds) <= 256
    step = max(1, _NUMBERS // (len(kinds) if by_kind else size))
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        if by_kind:
            times = random.multinomial(size, number / size, size=block)
            yield times @ kinds
        else:
            chosen = random.integers(0, size, (block, size)) + size * np.arange(block)[:, None]
            times = np.bincount(chosen.reshape(-1), minlength=block * size).reshape(block, size)
            yield times @ rows
