"""The frozen blocks below an image adapter: run once for every image, if there is room for what they give."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from clipgraft.data.args import FeatureArgs
from clipgraft.data.feature_cache import FeatureCache, format_bytes, open_cache
from clipgraft.data.feature_key import UnknownError, image_key
from clipgraft.data.features import image_rows, image_steps
from clipgraft.data.stored_rows import RowKind, StoredRows, available_memory, rows_in_memory
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.family import is_lora
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feature_sources import PartlyFixedImages
from clipgraft.train.setup import Setup

log = logging.getLogger("clipgraft")
_SHARE = 4
"""At most 1/4 of the memory that is free is filled: rows are there twice while they are put together."""


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
        return PartlyFixedImages(self.encoder, self._rows(progress), self.block)

    def _rows(self, progress: Callable[[int], None]) -> StoredRows:
        some = partial(self._rows_of, progress=progress)
        if self.world.alone:
            return some(self.images)
        if self.cache is None:
            return rows_in_memory(in_shares(self.world, self.images, lambda own: some(own).tensor()))
        some(self.images[self.world.share(len(self.images))] or self.images[:1])
        self.world.barrier()
        return self._rows_of(self.images, lambda images: None)

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

    The last block for a projection alone; 0 if patches, positions or any base weight train.
    """
    state = lora_state(clip)
    trained = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
    if state is None or any(not is_lora(name) and p is not clip.logit_scale for name, p in trained.items()):
        return 0
    if any(path.startswith("vision_model.") for path in state.chosen().norms):
        return 0
    sites = [site for site in state.layers if site.tower == "vision"]
    above = blocks - 1
    return min((above if site.role == "proj" else site.block or 0 for site in sites), default=0)
