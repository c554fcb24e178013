"""What a step reads: batches of ids, in an order that (seed, epoch) alone decides, and each tower's features.

A frozen tower with deterministic input is a constant, so its features are computed once and looked up. The
other tower computes its features anew each step; where only its upper blocks train, from what the others gave
once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.features import evaluating
from clipgraft.data.loading import PairBatches, Transform, batch_order
from clipgraft.data.stored_rows import StoredRows
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.train.distributed import ALONE, World


@dataclass(frozen=True)
class MicroBatch:
    """What is in memory at once: (n,) ids, (n, 3, H, W) pixels or None, and (n,) turns.

    A row's turn is the number of the pass over the data plus its caption's place among those of its image:
    over the passes each caption meets every turn, and within one pass the captions of an image are at
    different ones.
    """

    image_ids: Tensor
    caption_ids: Tensor
    pixels: Tensor | None
    turns: Tensor


class Feed:
    """Shuffled batches over the caption rows of `pairs`.

    A batch is a list of `accum_freq` micro-batches of `batch_size` pairs. Workers load micro-batches, so that
    no more than one whole batch of pixels is ever in memory. With several processes it is that many in each,
    and together the batch that one process would have with as many times the micro-batches.

    Attributes:
        captions: every distinct caption; `caption_ids` index it, so equal captions have equal ids.
        image_of_row, caption_of_row: (rows,) ids of every pair.
        steps: batches in an epoch; a last incomplete one is left out, as in open_clip, unless it is one of a
            given number of `steps`.
    """

    def __init__(
        self,
        pairs: Pairs,
        batch_size: int,
        accum_freq: int,
        seed: int,
        transform: Transform | None,
        workers: int,
        world: World = ALONE,
        steps: int | None = None,
    ) -> None:
        """With `steps` there is one epoch of so many batches, over as many passes as it takes.

        A pass's last incomplete batch is one of them, unless a step has several micro-batches.
        """
        rows = pairs.rows()
        self.captions = list(dict.fromkeys(caption for _, caption in rows))
        position = {caption: index for index, caption in enumerate(self.captions)}
        micro_batches = accum_freq * world.world_size
        drop_last = steps is None or micro_batches > 1
        fit = len(rows) // (batch_size * micro_batches)
        if fit == 0 and drop_last:
            raise DataError(_too_few(len(rows), batch_size, accum_freq, world.world_size))
        self.steps = fit if steps is None else steps
        self._order = partial(
            batch_order,
            *(len(rows), batch_size, seed),
            drop_last=drop_last,
            count=None if steps is None else steps * micro_batches,
        )
        self.image_of_row = torch.tensor([image for image, _ in rows])
        self.caption_of_row = torch.tensor([position[caption] for _, caption in rows])
        self._place_of_row = torch.tensor([place for texts in pairs.captions for place in range(len(texts))])
        self._batch_size = batch_size
        self._accum_freq = accum_freq
        self._seed = seed
        self._world = world
        self._loader = None
        if transform is not None:
            self._loader = PairBatches(
                pairs,
                transform,
                batch_size=batch_size,
                seed=seed,
                workers=workers,
                rank=world.rank,
                world_size=world.world_size,
                **self._order.keywords,
            )

    def batches(self, epoch: int, start: int) -> Generator[list[MicroBatch], None, None]:
        """The batches of an epoch from number `start` on."""
        with contextlib.closing(self._micro_batches(epoch, start * self._accum_freq)) as micro_batches:
            for _ in range(start, self.steps):
                yield list(islice(micro_batches, self._accum_freq))

    def _micro_batches(self, epoch: int, start: int) -> Generator[MicroBatch, None, None]:
        # Cutting one permutation into smaller pieces keeps its order: accumulation changes no batch.
        own = self._order(epoch)[self._world.rank :: self._world.world_size][start:]
        if self._loader is not None:
            with contextlib.closing(self._loader.batches(epoch, start)) as loaded:
                for (number, _), (pixels, _, _, row_ids) in zip(own, loaded, strict=True):
                    yield self._micro_batch(number, row_ids, pixels)
            return
        for number, rows in own:
            yield self._micro_batch(number, torch.from_numpy(rows), None)

    def _micro_batch(self, number: int, rows: Tensor, pixels: Tensor | None) -> MicroBatch:
        turns = self._place_of_row[rows] + number
        return MicroBatch(self.image_of_row[rows], self.caption_of_row[rows], pixels, turns)


def everywhere(batch: list[MicroBatch], world: World) -> list[MicroBatch]:
    """The micro-batches of all processes, by rank, of which those of others come without pixels."""
    if world.alone:
        return batch
    columns = [torch.cat([part.image_ids for part in batch]), torch.cat([part.caption_ids for part in batch])]
    gathered = world.gather(*columns, torch.cat([part.turns for part in batch]))
    return [MicroBatch(images, captions, None, turns) for images, captions, turns in gathered]


def _too_few(rows: int, batch_size: int, accum_freq: int, processes: int) -> str:
    times = f" x `accum_freq={accum_freq}`" if accum_freq > 1 else ""
    times += f" x {processes} processes" if processes > 1 else ""
    largest = rows // (accum_freq * processes)
    fix = f"use `batch_size={largest}` or less" if largest >= 2 else "add data, or lower `accum_freq`"
    return f"{rows} captions do not fill one batch of `batch_size={batch_size}`{times}: {fix}"


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
        return self.encode(batch.image_ids)

    def encode(self, ids: Tensor) -> Tensor:
        """(n,) indices of images -> (n, D), any norm."""
        return self.encoder.encode_from_block(self.inputs[ids], self.first)

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
