"""Intervals of the difference between two models, beside closed forms and SciPy's bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import clipgraft as cg
from clipgraft.evaluate.bootstrap import Interval, Outcomes, bootstrap_means, compare_outcomes
from clipgraft.evaluate.classification import classification_metrics
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.evaluate.retrieval import first_hits, retrieval_metrics


def outcomes(hits: np.ndarray, groups: np.ndarray | None = None) -> Outcomes:
    """Of one metric, each query a group of its own unless said otherwise."""
    return Outcomes({"acc1": hits}, {"acc1": np.arange(len(hits)) if groups is None else groups}, {})


def test_a_share_has_the_interval_of_the_normal_approximation() -> None:
    """An interval that is too narrow calls noise a gain."""
    hits = np.repeat([1.0, 0.0], [300, 700])
    found, _ = bootstrap_means([hits], [np.arange(1000)], resamples=20_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.value == pytest.approx(0.3)
    assert [found.low, found.high] == pytest.approx([0.3 - half, 0.3 + half], abs=0.0015)


@pytest.mark.parametrize("kinds", ["hits", "numbers"])
def test_scipy_agrees(kinds: str) -> None:
    """Both ways to draw, of few kinds of queries and of many, must give what a known library gives."""
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    values = (
        random.choice([-1.0, 0, 1], 400, p=[0.1, 0.7, 0.2]) if kinds == "hits" else random.normal(size=400)
    )
    wanted = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2)
    found, _ = bootstrap_means([values], [np.arange(400)], resamples=20_000)
    assert [found.low, found.high] == pytest.approx([*wanted.confidence_interval], abs=0.006)


def test_captions_of_one_image_stay_together() -> None:
    """Five captions that all got right at once are one piece of luck, not five."""
    random = np.random.default_rng(0)
    of_image = random.choice([-1.0, 0, 1], 200, p=[0.2, 0.5, 0.3])
    values, groups = np.repeat(of_image, 5), np.repeat(np.arange(200), 5)
    together, _ = bootstrap_means([values], [groups])
    apart, _ = bootstrap_means([values], [np.arange(1000)])
    once, _ = bootstrap_means([of_image], [np.arange(200)])
    assert (together.low, together.high) == (once.low, once.high)
    assert together.high - together.low == pytest.approx(math.sqrt(5) * (apart.high - apart.low), rel=0.1)


def test_columns_share_their_draws() -> None:
    """The interval of the mean of both directions must know that they move together."""
    values = np.repeat([1.0, 0.0], [40, 160])
    groups = np.arange(200)
    mean, columns = bootstrap_means([values, values], [groups, groups])
    assert mean == columns[0] == columns[1]
    opposite, _ = bootstrap_means([values, -values], [groups, groups])
    assert (opposite.value, opposite.low, opposite.high) == (0, 0, 0)


def test_groups_may_have_any_number_of_queries() -> None:
    """Images have one caption or many, and some columns have no query of a group."""
    mean, (images, captions) = bootstrap_means(
        [np.array([1.0, 0, 1]), np.array([1.0, 0, 0, 0, 1])],
        [np.array([3, 7, 9]), np.array([3, 3, 3, 7, 11])],
    )
    assert images.value == pytest.approx(2 / 3)
    assert captions.value == pytest.approx(2 / 5)
    assert mean.value == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert 0 <= images.low <= images.value <= images.high <= 1


def test_the_difference_is_paired() -> None:
    """Two models that fail at the same queries differ by little, however hard the queries are."""
    random = np.random.default_rng(3)
    before = (random.random(2000) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:30]] = 1
    found = compare_outcomes(outcomes(before), outcomes(after))
    assert found.mean.value == pytest.approx(0.015)
    assert found.mean.sign == 1
    assert (found.groups, found.changed) == (2000, 30)
    assert compare_outcomes(outcomes(before), outcomes(before)).mean == Interval(0.0, 0.0, 0.0)


def test_the_seed_decides() -> None:
    """A report that says another interval each time it is made cannot be trusted."""
    random = np.random.default_rng(4)
    before, after = random.integers(0, 2, 300), random.integers(0, 2, 300)
    first, again, other = (
        compare_outcomes(outcomes(before), outcomes(after), seed=s).mean for s in (0, 0, 1)
    )
    assert first == again != other


def test_other_queries_are_refused() -> None:
    """A difference between evaluations of other data means nothing."""
    with pytest.raises(cg.errors.DataError, match="acc1 is of 3 queries before and 4 after"):
        compare_outcomes(outcomes(np.ones(3)), outcomes(np.ones(4)))
    with pytest.raises(cg.errors.DataError, match="no query to resample"):
        bootstrap_means([np.array([])], [np.array([])])


def test_intervals_read_as_points() -> None:
    """Shares of one are not what anybody reads."""
    assert str(Interval(0.0312, -0.004, 0.0695)) == "+3.1, -0.4 to +7.0"
    assert [Interval(0, low, high).sign for low, high in ((0.1, 0.2), (-0.2, -0.1), (0, 0.2))] == [1, -1, 0]


def test_hits_are_the_metrics() -> None:
    """An interval around another number than the one in the table would be worse than none."""
    random = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(count, 6, generator=random) for count in (20, 45))
    owner = torch.arange(45) % 18  # two images have no caption
    ranks = retrieval_ranks(images, texts, owner)
    found, metrics = first_hits(ranks, owner), retrieval_metrics(images, texts, owner)
    assert {name: hits.mean() for name, hits in found.hits.items()} == {
        name: metrics[name] for name in ("image_to_text_R@1", "text_to_image_R@1")
    }
    assert found.chance == {"image_to_text_R@1": 1 / 18, "text_to_image_R@1": 1 / 20}
    assert sorted(set(found.groups["image_to_text_R@1"])) == list(range(18))


def test_chance_is_what_random_features_reach() -> None:
    """A reader takes the chance level for what a model that knows nothing gets."""
    random = torch.Generator().manual_seed(0)
    owner = torch.arange(60) % 20
    reached = []
    for _ in range(300):
        images, texts = (torch.randn(count, 8, generator=random) for count in (20, 60))
        hits = first_hits(retrieval_ranks(images, texts, owner), owner)
        reached.append([hits.hits[name].mean() for name in hits.chance])
    assert np.mean(reached, axis=0) == pytest.approx([*hits.chance.values()], abs=0.006)


def test_accuracy_has_outcomes_too() -> None:
    """A classifier's verdict is about the same number as its table."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    measured = classification_metrics(logits, torch.tensor([0, 1, 1]), ["a", "b"]).measured
    assert [*measured.outcomes.hits["acc1"]] == [True, True, False]
    assert measured.metrics["acc1"] == pytest.approx(2 / 3)
    assert measured.outcomes.chance == {"acc1": 0.5}
