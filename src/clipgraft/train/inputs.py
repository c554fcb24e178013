"""What the loop reads: batches, and each tower as features that are looked up or computed anew."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clipgraft.data.datasets import Pairs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.loading import SeededView, Transform
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.shown import shown_line
from clipgraft.train.activations import Activations, plan_activations
from clipgraft.train.args import TrainArgs
from clipgraft.train.distributed import World, in_shares
from clipgraft.train.feature_sources import (
    FeatureSource,
    FixedImages,
    FixedTexts,
    FrozenImages,
    LiveImages,
    LiveTexts,
    ViewedImages,
    trains,
)
from clipgraft.train.feed import Feed
from clipgraft.train.setup import Setup

log = logging.getLogger("clipgraft")
_NOT_CACHED = (
    "the image tower is frozen, but `augment` crops every image anew: features are not cached, images are "
    "decoded and encoded at every step; `cache_views=K` encodes K crops of each once, which is much faster"
)


@dataclass(frozen=True)
class Inputs:
    """Batches, both towers as features, and what computes more of these.

    Attributes:
        val_images: gives the features of the validation images as they are at the moment, (N, D) unit-norm;
            None if files must be encoded anew.
    """

    setup: Setup
    encoder: Encoder
    feed: Feed
    images: FeatureSource
    texts: FeatureSource
    val_images: Callable[[], Tensor] | None = None

    def encode_images(
        self,
        paths: Sequence[Path],
        what: str = "image features",
        *,
        encoder: Encoder | None = None,
        transform: Transform | None = None,
    ) -> Tensor:
        """(N, D) unit-norm features of files, looked up in the feature cache where it has them."""
        return _encode_images(self.setup, encoder or self.encoder, paths, what, transform)

    def val_features(self, paths: Sequence[Path]) -> Tensor:
        """(N, D) unit-norm features of the validation images as they are at the moment."""
        if self.val_images is not None:
            return self.val_images()
        features = self.setup.features
        encode = partial(
            encode_images,
            self.setup.clip,
            features=features.replace(feature_cache=None),
            encoder=self.encoder,
        )
        return in_shares(self.setup.world, paths, encode)

    def encode_captions(self, texts: Sequence[str], encoder: Encoder | None = None) -> Tensor:
        """(N, D) unit-norm features of texts, of which each process encodes a share."""
        encoder = encoder or self.encoder
        return in_shares(self.setup.world, texts, partial(encode_captions, encoder.clip, encoder=encoder))

    def encode_own_captions(self, texts: Sequence[str]) -> Tensor:
        """The same in this process alone."""
        return encode_captions(self.encoder.clip, texts, encoder=self.encoder)


def prepare_inputs(
    setup: Setup, encoder: Encoder, pairs: Pairs, val: Pairs | None = None, *, needs_tower: bool = True
) -> Inputs:
    """Decide for each tower whether it is a constant, or begins with one, and compute once what is.

    Features of a frozen image tower are looked up in the feature cache, and kept there. With `augment` a
    frozen image tower is no constant, unless `cache_views` says how many views of each image stand for all.
    Pixels of what is computed once come from the faster preprocessing, unless `exact_preprocess`; those of a
    tower that runs at every step never do. Without `needs_tower` something else than the model trains, too.
    Each of
    several processes encodes a share of what is computed once, and has all of it.

    Raises:
        ConfigError: nothing trains, there is no augmentation to train with, or options do not go together.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        ModelError: the model came without tokenizer or preprocessing.
    """
    clip, args, world = setup.clip, setup.train, setup.world
    live_images, live_texts = trains(clip, "vision"), trains(clip, "text")
    if not live_images and not live_texts and needs_tower:
        raise ConfigError(
            "nothing to train: both towers are frozen; drop `lock_image` or `lock_text`, or train an "
            "adapter (`apply_lora`)"
        )
    _check_views(live_images, args)
    lower = None
    if live_images and not args.augment:
        lower = plan_activations(setup, encoder, [*pairs.images, *(val.images if val else ())])
    decoded = (live_images and lower is None) or (args.augment and args.cache_views is None)
    transform = _transform(clip, args.augment) if decoded else None
    feed = Feed(pairs, args.batch_size, args.accum_freq, args.seed, transform, setup.features.workers, world)
    texts = _texts(encoder, feed, live_texts, world)
    if lower is not None:
        images, val_images = _partly_fixed(setup, lower, len(pairs))
        return Inputs(setup, encoder, feed, images, texts, val_images)
    if live_images:
        return Inputs(setup, encoder, feed, LiveImages(encoder), texts)
    if args.augment:
        images = _augmented_images(setup, encoder, pairs)
    else:
        log.info("the image tower is frozen: each image is encoded once")
        images = FixedImages(_encode_images(setup, encoder, pairs.images, "training images"))
    if val is None:
        return Inputs(setup, encoder, feed, images, texts)
    features = _encode_images(setup, encoder, val.images, "validation images")
    return Inputs(setup, encoder, feed, images, texts, lambda: features)


def _texts(encoder: Encoder, feed: Feed, live: bool, world: World) -> FeatureSource:
    if live:
        return LiveTexts(encoder, feed.captions)
    log.info("the text tower is frozen: each caption is encoded once")
    return FixedTexts(
        in_shares(world, feed.captions, partial(encode_captions, encoder.clip, encoder=encoder))
    )


def _partly_fixed(
    setup: Setup, lower: Activations, train: int
) -> tuple[FeatureSource, Callable[[], Tensor] | None]:
    """The image tower from its first trained block on, and what gives the features of validation images.

    The first `train` of the images are trained on, the others are for validation.
    """
    total = len(lower.images)
    with _bar(setup, lower.kind.stored, total) as advance:
        images = lower.compute(advance)
    if total == train:
        return images, None
    ids = range(train, total)
    return images, lambda: in_shares(setup.world, ids, lambda own: images.features(torch.tensor(own)))


def _augmented_images(setup: Setup, encoder: Encoder, pairs: Pairs) -> FeatureSource:
    """A frozen image tower on random crops."""
    views = setup.train.cache_views
    if views is None:
        log.info("%s", _NOT_CACHED)
        return FrozenImages(LiveImages(encoder))
    log.info("the image tower is frozen: %d augmented views of each image are encoded once", views)
    transform = _transform(setup.clip, augment=True)
    parts = [
        _encode_images(
            setup,
            encoder,
            pairs.images,
            f"training images, view {view + 1}",
            SeededView(transform, setup.train.seed, view),
        )
        for view in range(views)
    ]
    return ViewedImages(torch.stack(parts))


def _check_views(live_images: bool, args: TrainArgs) -> None:
    if args.cache_views is not None and not args.augment:
        raise ConfigError("`cache_views` given without `augment`: add `augment`, or drop `cache_views`")
    if args.cache_views is not None and live_images:
        raise ConfigError(
            "`cache_views` keeps features of a frozen image tower, but this run trains it: drop `cache_views`"
        )


def _transform(clip: Clip, augment: bool) -> Transform:
    if augment and clip.preprocess_train is None:
        raise ConfigError("`augment`: this base brings no augmenting transform (open_clip bases do); drop it")
    return clip.preprocess_train if augment and clip.preprocess_train else clip.require_preprocess()


def _encode_images(
    setup: Setup, encoder: Encoder, paths: Sequence[Path], what: str, transform: Transform | None = None
) -> Tensor:
    encode = partial(
        encode_images,
        encoder.clip,
        features=setup.features,
        encoder=encoder,
        progress=None if setup.shows else False,
        transform=transform,
        label=what,
    )
    return in_shares(setup.world, paths, encode)


@contextlib.contextmanager
def _bar(setup: Setup, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is told how many more images are done; of several processes rank 0 shows its share."""
    own = len(range(total)[setup.world.share(total)])
    with tqdm(desc=shown_line(what), total=own, unit="image", disable=None if setup.shows else True) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        yield advance
