"""What an approximation of the features costs: recall lost on pairs of images and captions.

A cosine near 1 does not say it. An approximation is harmless where it moves features less than they lie
apart, and only the user's own data tells how far apart they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.errors import ConfigError
from clipgraft.evaluate.metrics import DEFAULT_KS, DIRECTIONS
from clipgraft.evaluate.retrieval import retrieval_metrics

BothSides: TypeAlias = tuple[Tensor, Tensor]
"""Unit-norm features of the images, (N, D), and of all captions in the order of the images, (M, D)."""

_NAMES = tuple(f"{direction}_R@{k}" for direction in DIRECTIONS for k in DEFAULT_KS)


@dataclass(frozen=True)
class RecallLoss:
    """Recall with features and with an approximation of them.

    Attributes:
        captions: how many queries in one direction; the other has an image each.
        reference, approximate: recall@1, @5 and @10 in both directions, shares in [0, 1], by name.
    """

    captions: int
    reference: Mapping[str, float]
    approximate: Mapping[str, float]

    @property
    def worst(self) -> str:
        """The recall that loses most."""
        return max(_NAMES, key=lambda name: self.reference[name] - self.approximate[name])

    @property
    def points(self) -> float:
        """Percentage points that the worst of them loses; below 0 where all of them gain."""
        return 100 * (self.reference[self.worst] - self.approximate[self.worst])

    def __str__(self) -> str:
        exact, lossy = (100 * each[self.worst] for each in (self.reference, self.approximate))
        return f"{self.worst} is {lossy:.1f} % instead of {exact:.1f} % on {self.captions:,} captions"

    def require_at_most(self, limit: float, what: str) -> None:
        """Refuse an approximation, named `what`, that loses more points than `limit`.

        Raises:
            ConfigError: it does.
        """
        # Rounding in 100 · (a − b) must not refuse what loses exactly the limit.
        if not self.points <= limit + 1e-9:
            raise ConfigError(
                f"{what} loses {self.points:.2f} points of recall, more than `max_recall_loss={limit:g}` "
                f"allows: {self}; leave it out, or allow more"
            )


def recall_lost(reference: BothSides, approximate: BothSides, pairs: Pairs) -> RecallLoss:
    """Compare the recall of approximate features with that of the features they stand for.

    Args:
        reference: features of the images and captions of `pairs`.
        approximate: the same of an approximation; a side that is not approximated is given again.
        pairs: images with one or many captions each.

    Raises:
        DataError: features and pairs do not fit together.
        TrainingError: a feature is NaN or infinite.
    """
    owner = torch.tensor([index for index, group in enumerate(pairs.captions) for _ in group])
    measured = [
        {name: metrics[name] for name in _NAMES}
        for metrics in (retrieval_metrics(images, texts, owner) for images, texts in (reference, approximate))
    ]
    return RecallLoss(len(owner), *measured)
