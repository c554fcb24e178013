"""What the loop reads: batches, and each tower as features that are looked up or computed anew.

The frozen blocks below an image adapter run once for every image, if there is room for what they give.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache, format_bytes, open_cache
from clipgraft.data.feature_key import UnknownError, image_key
from clipgraft.data.features import encode_captions, encode_images, image_rows, image_steps
from clipgraft.data.loading import SeededView, Transform
from clipgraft.data.stored_rows import RowKind, StoredRows, available_memory, rows_in_memory
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.family import is_lora
from clipgraft.pictures import open_image
from clipgraft.progress import open_bar
from clipgraft.train.args import TrainArgs
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feed import (
    FeatureSource,
    Feed,
    FixedImages,
    FixedTexts,
    FrozenImages,
    LiveImages,
    LiveTexts,
    PartlyFixedImages,
    ViewedImages,
    trains,
)
from clipgraft.train.setup import Setup

log = logging.getLogger("clipgraft")
_NOT_CACHED = (
    "the image tower is frozen, but `augment` crops every image anew: features are not cached, images are "
    "decoded and encoded at every step"
)
CACHE_VIEWS = "`cache_views=K` would encode K crops of each image once, which is much faster"
_SHARE = 4
"""At most 1/4 of the memory that is free is filled: rows are there twice while they are put together."""


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

    def encode_images(self, paths: Sequence[Path], encoder: Encoder) -> Tensor:
        """(N, D) unit-norm features of files, looked up in the feature cache where it has them."""
        return _encode_images(self.setup, encoder, paths, "image features")

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

    def live_images(self, paths: Sequence[Path]) -> Callable[[Tensor], Tensor]:
        """What gives the features of some of the files, by index, as they are at the moment; any norm.

        What the frozen blocks below an adapter give is computed once, if there is room for it.
        """
        lower = plan_activations(self.setup, self.encoder, paths)
        if lower is not None:
            with _bar(self.setup, "retained pictures", len(paths)) as advance:
                return lower.compute(advance).encode
        transform = self.setup.clip.require_preprocess()

        def encode(ids: Tensor) -> Tensor:
            pixels = torch.stack([transform(open_image(paths[index])) for index in ids.tolist()])
            return self.encoder.encode_image(pixels)

        return encode

    def encode_captions(self, texts: Sequence[str], encoder: Encoder | None = None) -> Tensor:
        """(N, D) unit-norm features of texts, of which each process encodes a share."""
        encoder = encoder or self.encoder
        tokenize = self._tokenize if encoder.clip is self.setup.clip else None
        encode = partial(encode_captions, encoder.clip, encoder=encoder, tokenize=tokenize)
        return in_shares(self.setup.world, texts, encode)

    @cached_property
    def _tokenize(self) -> Callable[[tuple[str, ...]], Tensor]:
        """The model's own, for which the same captions come again after every epoch: two lists are kept."""
        return lru_cache(maxsize=2)(self.setup.clip.tokenize)


def prepare_inputs(
    setup: Setup, encoder: Encoder, pairs: Pairs, val: Pairs | None = None, *, needs_tower: bool = True
) -> Inputs:
    """Decide for each tower whether it is a constant, or begins with one, and compute once what is.

    Features of a frozen image tower are looked up in the feature cache, and kept there. With `augment` a
    frozen image tower is no constant, unless `cache_views` says how many views of each image stand for all.
    Pixels of what is computed once come from the faster preprocessing, unless `exact_preprocess`; those of a
    tower that runs at every step never do. Without `needs_tower` something else than the model trains, too.
    Each of several processes encodes a share of what is computed once, and has all of it.

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
    feed = Feed(
        *(pairs, args.batch_size, args.accum_freq, args.seed, transform, setup.features.workers, world),
        steps=args.steps,
    )
    texts: FeatureSource = (
        LiveTexts(encoder, feed.captions) if live_texts else _fixed_texts(encoder, feed, world)
    )
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


def _fixed_texts(encoder: Encoder, feed: Feed, world: World) -> FixedTexts:
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
        log.info(_NOT_CACHED)
        log.info(CACHE_VIEWS)
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
    with open_bar(what, "image", own, shows=None if setup.shows else False) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        yield advance


@dataclass(frozen=True)
class Activations:
    """The input of one image block for many images, not computed yet.

    Attributes:
        block: the first one that training changes.
        cache: where rows are kept; None for memory.
        world: processes that each compute a share of the rows, and all of which need all of them.
    """

    encoder: Encoder
    images: Sequence[Path]
    block: int
    features: FeatureArgs
    cache: FeatureCache | None = None
    world: World = ALONE

    @property
    def kind(self) -> RowKind:
        """What a row is: in bf16 where the blocks compute in it, which halves what is read at a step."""
        dtype = torch.bfloat16 if self.encoder.dtype == torch.bfloat16 else torch.float32
        return RowKind(f"input of vision block {self.block}", dtype, self.encoder.vision_shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.encoder.vision_shape) * self.kind.dtype.itemsize

    def compute(self, progress: Callable[[int], None]) -> PartlyFixedImages:
        """Run the frozen blocks on every image that the cache does not hold."""
        some = partial(self._rows_of, progress=progress)
        if self.world.alone:
            rows = some(self.images)
        elif self.cache is None:
            rows = rows_in_memory(in_shares(self.world, self.images, lambda own: some(own).tensor()))
        else:
            some(self.images[self.world.share(len(self.images))] or self.images[:1])
            self.world.barrier()
            rows = self._rows_of(self.images, lambda images: None)
        return PartlyFixedImages(self.encoder, rows, self.block)

    def _rows_of(self, images: Sequence[Path], progress: Callable[[int], None]) -> StoredRows:
        return image_rows(
            self.encoder.clip,
            images,
            partial(self.encoder.encode_to_block, block=self.block),
            self.features.replace(autocast=self.encoder.autocast),
            self.kind,
            progress=progress,
            cache=self.cache,
            label=self.kind.stored,
        )

    def cache_shortage(self, cache: FeatureCache) -> str | None:
        """Why the cache would not keep all rows; None if it would."""
        steps = image_steps(self.encoder.clip, exact_preprocess=self.features.exact_preprocess)
        try:
            key = image_key(self.encoder.clip, steps, self.kind, autocast=self.encoder.autocast)
        except UnknownError as reason:
            return f"the feature cache cannot name a preprocessing that holds {reason}"
        return cache.shortage(key, self.images, self.row_bytes)


def plan_activations(setup: Setup, encoder: Encoder, images: Sequence[Path]) -> Activations | None:
    """What to compute once before training the image tower; None if all of it must run at every step.

    Rows go to the feature cache if it has room for them, else to memory if a quarter of what is free will do.
    One line says which, and how much it is.
    """
    blocks, world = encoder.vision_blocks, setup.world
    block = first_trained_block(encoder.clip, blocks)
    if not 0 < block < blocks:
        return None
    cache = open_cache(setup.features)
    plan = Activations(encoder, images, block, setup.features, world=world)
    place = world.on_rank0(lambda: _place(plan, cache, blocks))
    return None if place is None else replace(plan, cache=cache if place == "cache" else None)


def _place(plan: Activations, cache: FeatureCache | None, blocks: int) -> Literal["cache", "memory"] | None:
    """Where the rows are kept; None for nowhere."""
    images, block = plan.images, plan.block
    total = len(images) * plan.row_bytes
    below = f"the image tower is frozen below block {block} of {blocks}"
    size = f"{len(images):,} images x {plan.row_bytes / 1e3:,.1f} kB = {format_bytes(total)}"
    shortage = "there is no feature cache" if cache is None else plan.cache_shortage(cache)
    if shortage is None:
        log.info("%s: the input of that block is computed once, %s in the feature cache", below, size)
        return "cache"
    free = available_memory() or 0
    if _SHARE * total * plan.world.world_size <= free:
        log.info("%s: the input of that block is computed once, %s in memory (%s)", below, size, shortage)
        return "memory"
    log.info(
        "%s, but all of it runs at every step: the input of that block would be %s, more than a quarter of "
        "the %s of memory that is free, and %s",
        below,
        size,
        format_bytes(free),
        shortage,
    )
    return None


def first_trained_block(clip: Clip, blocks: int) -> int:
    """Number of the lowest image block whose input no training changes, nor anything above it needs.

    The last block for a projection or pooling alone; 0 if patches, positions or any base weight train.
    """
    state = lora_state(clip)
    trained = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
    temperature = set(map(id, clip.temperature.values()))
    if state is None or any(not is_lora(name) and id(p) not in temperature for name, p in trained.items()):
        return 0
    if any(path.startswith("vision_model.") for path in state.chosen().norms):
        return 0
    sites = [site for site in state.layers if site.tower == "vision"]
    above = blocks - 1
    return min((above if site.is_above_blocks else site.block or 0 for site in sites), default=0)
