"""What the loop reads: batches, and each tower as features that are looked up or computed anew."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.loading import Transform
from clipgraft.data.pairs import Pairs
from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.train.feed import Feed
from clipgraft.train.towers import FixedImages, FixedTexts, LiveImages, LiveTexts, Tower, trains

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class Inputs:
    """Batches, both towers, and the features of the validation images where they are constant."""

    feed: Feed
    images: Tower
    texts: Tower
    val_images: Tensor | None


def prepare_inputs(
    clip: Clip,
    train: Pairs,
    val: Pairs | None,
    *,
    batch_size: int,
    accum_freq: int,
    seed: int,
    augment: bool,
    autocast: bool,
    workers: int,
    progress: bool,
    image_features: Tensor | None = None,
) -> Inputs:
    """Decide for each tower whether it is a constant, and encode once what is.

    `image_features`, (N, D) unit-norm, spares encoding `train.images` where the image tower is frozen.

    Raises:
        ConfigError: nothing trains, or there is no augmentation to train with.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        ModelError: the model came without tokenizer or preprocessing.
    """
    live_images, live_texts = trains(clip, "vision"), trains(clip, "text")
    if not live_images and not live_texts:
        raise ConfigError("nothing to train: both towers are frozen; drop a --lock flag or add --use-lora")
    transform = _transform(clip, augment) if live_images else None
    feed = Feed(train, batch_size, accum_freq, seed, transform, workers)
    texts: Tower
    if live_texts:
        texts = LiveTexts(clip, feed.captions, autocast)
    else:
        log.info("the text tower is frozen: each caption is encoded once")
        texts = FixedTexts(encode_captions(clip, feed.captions, autocast=autocast))
    if live_images:
        return Inputs(feed, LiveImages(clip, autocast), texts, None)
    log.info("the image tower is frozen: each image is encoded once")
    images = image_features
    if images is None:
        images = _encode_once(clip, train, "training images", autocast, workers, progress)
    val_images = None
    if val is not None:
        val_images = _encode_once(clip, val, "validation images", autocast, workers, progress)
    return Inputs(feed, FixedImages(images), texts, val_images)


def _transform(clip: Clip, augment: bool) -> Transform:
    if augment and clip.preprocess_train is None:
        raise ConfigError("--augment: this base brings no augmenting transform (open_clip bases do); drop it")
    return clip.preprocess_train if augment and clip.preprocess_train else clip.require_preprocess()


def _encode_once(clip: Clip, pairs: Pairs, what: str, autocast: bool, workers: int, progress: bool) -> Tensor:
    with tqdm(desc=what, total=len(pairs), unit="image", disable=None if progress else True) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        return encode_images(clip, pairs.images, workers=workers, autocast=autocast, progress=advance)
