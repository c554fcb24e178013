"""A frozen image tower whose input is augmented: views that were encoded once, or new crops at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipgraft.data.features import evaluating
from clipgraft.train.feed import MicroBatch
from clipgraft.train.towers import LiveImages


@dataclass(frozen=True)
class ViewedImages:
    """Features of K views of every image, (K, images, D); successive turns use successive views."""

    features: Tensor

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.features[batch.turns % len(self.features), batch.image_ids]


@dataclass(frozen=True)
class FrozenImages:
    """The image tower on the pixels of the batch, as the features that are computed once would be: in eval
    mode, and without a graph."""

    live: LiveImages

    def __call__(self, batch: MicroBatch) -> Tensor:
        with evaluating(self.live.encoder.clip), torch.no_grad():
            return self.live(batch)
