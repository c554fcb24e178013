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

from clipgraft.models.clip import Clip


class Tower(Protocol):
    """Features of a part of a batch."""

    def __call__(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """(n,) image or caption ids and, where images are loaded, their (n, 3, H, W) pixels -> (n, D)."""


@dataclass(frozen=True)
class FixedFeatures:
    """Features of a frozen tower, (number of ids, D)."""

    features: Tensor

    def __call__(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        return self.features[ids]


@dataclass(frozen=True)
class LiveImages:
    """The image tower on the pixels of the batch."""

    clip: Clip
    autocast: bool

    def __call__(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        assert pixels is not None
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast):
            return self.clip.encode_image(pixels)


class LiveText:
    """The text tower on captions that were tokenized once; each batch is cut at its longest caption."""

    def __init__(self, clip: Clip, captions: Sequence[str], autocast: bool) -> None:
        self.clip = clip
        self.autocast = autocast
        self.tokens = clip.tokenize(captions)

    def __call__(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        tokens = self.tokens[ids.cpu()]
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast):
            return self.clip.encode_text(tokens)


def trains(clip: Clip, tower: str) -> bool:
    """Whether any weight of a tower has a gradient to compute."""
    groups = clip.family.tower_groups(clip.model, "text" if tower == "text" else "vision")
    return any(parameter.requires_grad for group in groups for parameter in group)
