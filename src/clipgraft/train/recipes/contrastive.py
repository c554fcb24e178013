"""Learn to match images and captions: the contrastive loss of a model, over the batch or over a gallery."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.errors import DataError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.train.feed import FeatureSource, FixedImages, MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.gallery import choose_gallery
from clipgraft.train.recipes.pair_losses import PairLoss, choose_loss, make_pair_loss
from clipgraft.train.recipes.recipe import Objective, Recipe

log = logging.getLogger("clipgraft")
_FEW_CAPTIONS = 20
"""Pairs that share a caption on average, from which on captions look like classes."""


class ContrastiveRecipe(Recipe):
    """Each image is told from all other captions, and each caption from all other images."""

    def check(self) -> None:
        require_contrast(self.pairs)

    def settings(self) -> dict[str, Any]:
        """The training data by names and captions."""
        return {"data": digest_of(self.pairs)}

    def objective(self, inputs: Inputs) -> Objective:
        if isinstance(inputs.images, FixedImages):
            require_different(inputs.images.features)
        return contrastive(inputs)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val is not None
        val = self.val
        images = inputs.val_features(val.images)
        texts = inputs.encode_captions([caption for group in val.captions for caption in group])
        # Several processes encode a share each, and rank 0 counts.
        return inputs.setup.world.on_rank0(lambda: measure_retrieval(inputs.encoder, val, images, texts))


def digest_of(pairs: Pairs) -> str:
    """Return a digest of names of images and captions, for the record of a run that may be resumed."""
    digest = hashlib.sha256()
    for image, caption in pairs.rows():
        told = f"{image}\t{pairs.images[image].name}\t{caption}\n"
        digest.update(told.encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def contrastive(inputs: Inputs) -> Contrastive:
    """The contrastive objective, over the gallery of a frozen tower where there is one."""
    clip, train = inputs.setup.clip, inputs.setup.train
    gallery = choose_gallery(inputs.feed, inputs.images, inputs.texts, train.negatives)
    gallery = None if gallery is None else gallery.on(clip.device)
    pair_loss = make_pair_loss(clip, choose_loss(clip, train.loss), gallery)
    return Contrastive(clip, inputs.images, inputs.texts, pair_loss)


def require_contrast(train: Pairs) -> None:
    """Refuse pairs among which no image or no caption can be told from another.

    Equal captions are no negatives of one another, nor are captions of one image: a softmax is 0.0 at every
    step, and a sigmoid only draws everything together.

    Raises:
        DataError: saying what there is only one of.
    """
    rows = train.rows()
    captions = {caption for _, caption in rows}
    images = {train.images[image] for image, _ in rows}
    if len(captions) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are the same, {next(iter(captions))[:60]!r}, and "
            "equal captions are no negatives of one another; check the caption column (`csv_caption_key`), "
            "or give captions that differ"
        )
    if len(images) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are of one image, {next(iter(images)).name}, and "
            "no other is there to tell it from; check the image column (`csv_img_key`), or give more images"
        )
    if len(rows) >= _FEW_CAPTIONS * len(captions):
        log.warning(
            "%d pairs have only %d different captions, and equal ones are no negatives of one another: if "
            "they are classes, `fit_classifier` learns more from them",
            len(rows),
            len(captions),
        )


def require_different(features: Tensor) -> None:
    """Refuse images whose features, (N, D) unit-norm of a frozen tower, are all the same.

    Raises:
        DataError: they are.
    """
    if float((features - features[:1]).abs().max()) < 1e-6:
        raise DataError(
            f"nothing to learn: the frozen image tower gives the same features for all {len(features):,} "
            "images, as if they were copies of one; check the images, or train the image tower too "
            "(`targets=linear`)"
        )


@dataclass(frozen=True)
class Contrastive:
    """Images and captions that belong together, told from all others.

    Attributes:
        images, texts: what each tower gives for a micro-batch.
        pair_loss: of the features of all micro-batches.
    """

    clip: Clip
    images: FeatureSource
    texts: FeatureSource
    pair_loss: PairLoss

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return [self._encode(part) for part in batch]

    def _encode(self, part: MicroBatch) -> Encode:
        device = self.clip.device
        return lambda: (queued(self.images(part), device), queued(self.texts(part), device))

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        image_ids = torch.cat([part.image_ids for part in batch])
        caption_ids = torch.cat([part.caption_ids for part in batch])
        return lambda images, texts: self.pair_loss(images, texts, image_ids, caption_ids)
