"""What a step minimises: how a batch becomes features, and the loss of those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.evaluate.classification import pool_prompts
from clipgraft.models.clip import Clip
from clipgraft.train.classes import class_loss
from clipgraft.train.feature_sources import FeatureSource
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Features, Loss
from clipgraft.train.negatives import Gallery, pair_loss


class Objective(Protocol):
    """A loss over the features of all micro-batches of a step (`accumulate.contrastive_backward`)."""

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        """Functions that each give (image, text) features of a part of the batch."""

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        """The scalar loss of the image and text features of all parts."""


@dataclass(frozen=True)
class Contrastive:
    """Images and captions that belong together, told from all others.

    Attributes:
        images, texts: what each tower gives for a micro-batch.
        gallery: what the trained tower is contrasted with besides the batch.
    """

    clip: Clip
    images: FeatureSource
    texts: FeatureSource
    gallery: Gallery | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return [self._encode(part) for part in batch]

    def _encode(self, part: MicroBatch) -> Encode:
        device = self.clip.device
        return lambda: (self.images(part).to(device), self.texts(part).to(device))

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        image_ids = torch.cat([part.image_ids for part in batch])
        caption_ids = torch.cat([part.caption_ids for part in batch])
        return lambda images, texts: pair_loss(
            images, texts, self.clip.logit_scale, image_ids, caption_ids, self.gallery
        )


@dataclass(frozen=True)
class Prompted:
    """Images told apart by class: cross-entropy over the classes' prompts.

    Prompts are encoded once a step, as a part of their own, and not at all if their features are fixed; each
    of several processes encodes a share of them.

    Attributes:
        images: what the image tower gives for a micro-batch.
        prompts: () -> (P, D) features of all prompts, class by class, any norm; of several processes, this
            one's share; None if it has none.
        counts: how many prompts each class has.
        class_of_caption: (captions,) the class that a caption id stands for.
        weights: (C,) of the classes in the loss, or None.
    """

    clip: Clip
    images: FeatureSource
    prompts: Callable[[], Tensor] | None
    counts: Sequence[int]
    class_of_caption: Tensor
    weights: Tensor | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        images = _images_alone(self.clip, self.images, batch)
        return images if self.prompts is None else [partial(self._encode_prompts, self.prompts), *images]

    def _encode_prompts(self, prompts: Callable[[], Tensor]) -> Features:
        texts = prompts().to(self.clip.device)
        return texts.new_empty(0, texts.shape[1]), texts

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        labels = torch.cat([self.class_of_caption[part.caption_ids] for part in batch])

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            prototypes = pool_prompts(F.normalize(texts.float(), dim=-1), self.counts)
            scale = self.clip.logit_scale.float().exp()
            return class_loss(images, prototypes, scale, labels, self.weights)

        return loss


@dataclass(frozen=True)
class Headed:
    """Images told apart by a classifier on their features (`classes.Head`); texts play no part."""

    clip: Clip
    images: FeatureSource
    head: nn.Module
    class_of_caption: Tensor
    weights: Tensor | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return _images_alone(self.clip, self.images, batch)

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        labels = torch.cat([self.class_of_caption[part.caption_ids] for part in batch])

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            weights = None if self.weights is None else self.weights.to(images.device)
            logits: Tensor = self.head(images)
            return F.cross_entropy(logits, labels.to(images.device), weight=weights)

        return loss


def _images_alone(clip: Clip, images: FeatureSource, batch: Sequence[MicroBatch]) -> list[Encode]:
    """Parts that bring no texts."""

    def encode(part: MicroBatch) -> Features:
        features = images(part).to(clip.device)
        return features, features.new_empty(0, features.shape[1])

    return [partial(encode, part) for part in batch]
