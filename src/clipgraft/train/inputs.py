"""What the loop reads: batches, and each tower as features that are looked up or computed anew."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.loading import SeededView, Transform
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.shown import shown_line
from clipgraft.train.activations import Activations, plan_activations
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feature_sources import (
    FixedImages,
    FixedTexts,
    FrozenImages,
    LiveImages,
    LiveTexts,
    Tower,
    ViewedImages,
    trains,
)
from clipgraft.train.feed import Feed

log = logging.getLogger("clipgraft")
_NOT_CACHED = (
    "the image tower is frozen, but --augment crops every image anew: features are not cached, images are "
    "decoded and encoded at every step; --cache-views K encodes K crops of each once, which is much faster"
)


@dataclass(frozen=True)
class Inputs:
    """Batches, both towers, and the features of the validation images.

    `val_images` gives them as they are at the moment, (N, D) unit-norm; None if files must be encoded anew.
    """

    feed: Feed
    images: Tower
    texts: Tower
    val_images: Callable[[], Tensor] | None


def prepare_inputs(
    clip: Clip,
    train: Pairs,
    val: Pairs | None,
    *,
    batch_size: int,
    accum_freq: int,
    seed: int,
    augment: bool,
    encoder: Encoder,
    workers: int,
    progress: bool,
    image_features: Tensor | None = None,
    cache: FeatureCache | None = None,
    cache_views: int | None = None,
    exact_preprocess: bool = False,
    may_be_frozen: bool = False,
    world: World = ALONE,
) -> Inputs:
    """Decide for each tower whether it is a constant, or begins with one, and compute once what is.

    `image_features`, (N, D) unit-norm, spares encoding `train.images` where the image tower is frozen. Other
    features of a frozen image tower are looked up in `cache`, and kept there. With `augment` a frozen image
    tower is no constant, unless `cache_views` says how many views of each image stand for all. Pixels of what
    is computed once come from the faster preprocessing, unless `exact_preprocess`; those of a tower that runs
    at every step never do. `may_be_frozen` says that something else than the model trains, too. Each of
    several `world` encodes a share of what is computed once, and has all of it.

    Raises:
        ConfigError: nothing trains, there is no augmentation to train with, or what is given does not go with
            it.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        ModelError: the model came without tokenizer or preprocessing.
    """
    live_images, live_texts = trains(clip, "vision"), trains(clip, "text")
    if not live_images and not live_texts and not may_be_frozen:
        raise ConfigError("nothing to train: both towers are frozen; drop a --lock flag or add --use-lora")
    _check_views(live_images, augment, cache_views, image_features)
    lower = None
    if live_images and not augment:
        files = [*train.images, *(val.images if val else ())]
        lower = plan_activations(encoder, files, cache=cache, exact_preprocess=exact_preprocess, world=world)
    decoded = (live_images and lower is None) or (augment and cache_views is None)
    transform = _transform(clip, augment) if decoded else None
    feed = Feed(train, batch_size, accum_freq, seed, transform, workers, world)
    texts = _texts(encoder, feed, live_texts, world)
    if lower is not None:
        return _partly_fixed(feed, lower, texts, len(train), workers, progress)
    if live_images:
        return Inputs(feed, LiveImages(encoder), texts, None)

    encode = partial(
        _encode_once,
        clip,
        encoder=encoder,
        workers=workers,
        progress=progress,
        cache=cache,
        exact_preprocess=exact_preprocess,
        world=world,
    )
    if augment:
        images = _augmented_images(clip, train, encode, cache_views, seed, encoder)
    else:
        log.info("the image tower is frozen: each image is encoded once")
        images = FixedImages(encode(train, "training images") if image_features is None else image_features)
    if val is None:
        return Inputs(feed, images, texts, None)
    features = encode(val, "validation images")
    return Inputs(feed, images, texts, lambda: features)


def _texts(encoder: Encoder, feed: Feed, live: bool, world: World) -> Tower:
    if live:
        return LiveTexts(encoder, feed.captions)
    log.info("the text tower is frozen: each caption is encoded once")
    return FixedTexts(
        in_shares(world, feed.captions, partial(encode_captions, encoder.clip, encoder=encoder))
    )


def _partly_fixed(
    feed: Feed, lower: Activations, texts: Tower, train: int, workers: int, progress: bool
) -> Inputs:
    """The first `train` of the images are trained on, the others are for validation."""
    total, world = len(lower.images), lower.world
    with _bar(lower.stored, total, progress, world) as advance:
        images = lower.compute(workers, advance)
    if total == train:
        return Inputs(feed, images, texts, None)
    ids = range(train, total)
    return Inputs(
        feed, images, texts, lambda: in_shares(world, ids, lambda own: images.features(torch.tensor(own)))
    )


def _augmented_images(
    clip: Clip,
    train: Pairs,
    encode: Callable[..., Tensor],
    cache_views: int | None,
    seed: int,
    encoder: Encoder,
) -> Tower:
    """A frozen image tower on random crops."""
    if cache_views is None:
        log.info("%s", _NOT_CACHED)
        return FrozenImages(LiveImages(encoder))
    log.info("the image tower is frozen: %d augmented views of each image are encoded once", cache_views)
    transform = _transform(clip, augment=True)
    parts = [
        encode(train, f"training images, view {view + 1}", transform=SeededView(transform, seed, view))
        for view in range(cache_views)
    ]
    return ViewedImages(torch.stack(parts))


def _check_views(
    live_images: bool, augment: bool, cache_views: int | None, image_features: Tensor | None
) -> None:
    if cache_views is not None and not augment:
        raise ConfigError("--cache-views given without --augment: add augment, or drop cache_views")
    if cache_views is not None and live_images:
        raise ConfigError(
            "--cache-views keeps features of a frozen image tower, but this run trains it: drop --cache-views"
        )
    if augment and image_features is not None and not live_images:
        raise ConfigError("image_features are of images without --augment: give one of the two")


def _transform(clip: Clip, augment: bool) -> Transform:
    if augment and clip.preprocess_train is None:
        raise ConfigError("--augment: this base brings no augmenting transform (open_clip bases do); drop it")
    return clip.preprocess_train if augment and clip.preprocess_train else clip.require_preprocess()


def _encode_once(
    clip: Clip,
    pairs: Pairs,
    what: str,
    *,
    encoder: Encoder,
    workers: int,
    progress: bool,
    cache: FeatureCache | None,
    exact_preprocess: bool,
    world: World,
    transform: Transform | None = None,
) -> Tensor:
    encode = partial(
        encode_images,
        clip,
        workers=workers,
        encoder=encoder,
        progress=None if progress and world.is_rank0 else False,
        cache=cache,
        transform=transform,
        exact_preprocess=exact_preprocess,
        label=what,
    )
    return in_shares(world, pairs.images, encode)


@contextlib.contextmanager
def _bar(what: str, total: int, progress: bool, world: World) -> Iterator[Callable[[int], None]]:
    """Gives what is told how many more images are done; of several processes rank 0 shows its share."""
    own = len(range(total)[world.share(total)])
    with tqdm(
        desc=shown_line(what), total=own, unit="image", disable=None if progress and world.is_rank0 else True
    ) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        yield advance
