"""What a tower gives for a batch: features looked up, or computed with a graph.

A frozen tower with deterministic input is a constant, so its features are computed once and looked up. The
other tower computes its features anew each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clipgraft.lora.inject import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower as TowerName
from clipgraft.train.feed import MicroBatch


class Tower(Protocol):
    """Features of a micro-batch."""

    def __call__(self, batch: MicroBatch) -> Tensor:
        """n pairs -> (n, D), any norm."""


@dataclass(frozen=True)
class FixedImages:
    """Features of a frozen image tower, (images, D)."""

    features: Tensor

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.features[batch.image_ids]


@dataclass(frozen=True)
class FixedTexts:
    """Features of a frozen text tower, (distinct captions, D)."""

    features: Tensor

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.features[batch.caption_ids]


@dataclass(frozen=True)
class LiveImages:
    """The image tower on the pixels of the batch."""

    clip: Clip
    autocast: bool

    def __call__(self, batch: MicroBatch) -> Tensor:
        assert batch.pixels is not None
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast):
            return self.clip.encode_image(batch.pixels)


class LiveTexts:
    """The text tower on captions that were tokenized once; each batch is cut at its longest caption."""

    def __init__(self, clip: Clip, captions: Sequence[str], autocast: bool) -> None:
        self.clip = clip
        self.autocast = autocast
        self.tokens = clip.tokenize(captions)

    def __call__(self, batch: MicroBatch) -> Tensor:
        tokens = self.tokens[batch.caption_ids]
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast):
            return self.clip.encode_text(tokens)


def trains(clip: Clip, tower: TowerName) -> bool:
    """Whether any weight of a tower has a gradient to compute."""
    state = lora_state(clip)
    if state is not None:
        return any(site.tower == tower for site in state.layers)
    groups = clip.family.tower_groups(clip.model, tower)
    return any(parameter.requires_grad for group in groups for parameter in group)
