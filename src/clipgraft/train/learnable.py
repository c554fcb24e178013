"""Runs that cannot learn: said before training where the data show it, and after it where the losses do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.errors import DataError

log = logging.getLogger("clipgraft")
_FEW_CAPTIONS = 20
"""Pairs that share a caption on average, from which on captions look like classes."""
_SAME = 1e-4  # share of a loss


def require_contrast(train: Pairs) -> None:
    """Refuse pairs among which no image or no caption can be told from another.

    Equal captions are no negatives of one another, nor are captions of one image: the loss is 0.0 at every
    step.

    Raises:
        DataError: saying what there is only one of.
    """
    rows = train.rows()
    captions = {caption for _, caption in rows}
    images = {train.images[image] for image, _ in rows}
    if len(captions) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are the same, {next(iter(captions))[:60]!r}, and "
            "equal captions are no negatives of one another; check the caption column (--csv-caption-key), "
            "or give captions that differ"
        )
    if len(images) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are of one image, {next(iter(images)).name}, and "
            "no other is there to tell it from; check the image column (--csv-img-key), or give more images"
        )
    if len(rows) >= _FEW_CAPTIONS * len(captions):
        log.warning(
            "%d pairs have only %d different captions, and equal ones are no negatives of one another: if "
            "they are classes, --task classification learns more from them",
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
            "(--lora-targets linear)"
        )


def require_classes(train: Labelled) -> None:
    """Refuse labelled images of one class: any classifier is always right, and the loss is 0.0 at every step.

    Raises:
        DataError: naming the class.
    """
    present = set(train.labels)
    if len(train.classes) < 2:
        raise DataError(
            f"nothing to learn: all {len(train):,} images are of one class, {train.classes[0]!r}; check the "
            "label column (--csv-label-key), or give images of another class"
        )
    if len(present) == 1:
        log.warning(
            "all %d training images are of one class, %s of %d: the model learns to answer nothing else",
            len(train),
            train.classes[next(iter(present))],
            len(train.classes),
        )


def nothing_learnt(losses: Sequence[float], steps: int) -> str | None:
    """What the losses of a run say against it; None where they say nothing. `steps` is those of an epoch."""
    if not losses:
        return None
    if max(map(abs, losses)) < 1e-6:
        return (
            "nothing was learnt: the loss was 0.0 at every step, since no pair of a batch had a negative; "
            "give more different images and captions, or a larger --batch-size"
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
            "last; raise --lr"
        )
    return None
