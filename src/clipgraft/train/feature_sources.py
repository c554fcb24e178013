"""What a tower gives for a batch: features looked up, or computed with a graph.

A frozen tower with deterministic input is a constant, so its features are computed once and looked up. The
other tower computes its features anew each step; where only its upper blocks train, from what the others gave
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.features import evaluating
from clipgraft.data.stored_rows import StoredRows
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.train.feed import MicroBatch


class FeatureSource(Protocol):
    """Features of a micro-batch, by one tower."""

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

    encoder: Encoder

    def __call__(self, batch: MicroBatch) -> Tensor:
        assert batch.pixels is not None
        return self.encoder.encode_image(batch.pixels)


@dataclass(frozen=True)
class PartlyFixedImages:
    """The image tower from block `first` on.

    `inputs`, (images, 1 + patches, dim), are what the frozen blocks below gave for every image. Kept in
    bfloat16 they are rounded residuals, each off by up to 0.4 %; in float32 nothing is lost.
    """

    encoder: Encoder
    inputs: StoredRows
    first: int

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.encoder.encode_from_block(self.inputs[batch.image_ids], self.first)

    def features(self, ids: Tensor) -> Tensor:
        """Unit-norm features of images, (n, D) on the CPU, in eval mode: what `encode_images` gives."""
        with evaluating(self.encoder.clip), torch.no_grad():
            parts = [
                self.encoder.encode_from_block(self.inputs[part], self.first) for part in torch.split(ids, 64)
            ]
            return F.normalize(torch.cat(parts), dim=-1).cpu()


class LiveTexts:
    """The text tower on captions that were tokenized once."""

    def __init__(self, encoder: Encoder, captions: Sequence[str]) -> None:
        self.encoder = encoder
        self.tokens = encoder.clip.tokenize(captions)

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.encoder.encode_text(self.tokens[batch.caption_ids])


def trains(clip: Clip, tower: Tower) -> bool:
    """Whether any weight of a tower has a gradient to compute."""
    state = lora_state(clip)
    if state is not None:
        return state.adapter is not None and state.adapter.touches(tower)
    groups = clip.family.tower_groups(clip.model, tower)
    return any(parameter.requires_grad for group in groups for parameter in group)


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
