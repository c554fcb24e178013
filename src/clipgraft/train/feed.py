"""Batches of ids, with pixels where the image tower trains, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipgraft.data.loading import PairBatches, Transform, epoch_batches
from clipgraft.data.pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """One optimizer step's pairs: (N,) ids, and (N, 3, H, W) pixels or None."""

    image_ids: Tensor
    caption_ids: Tensor
    pixels: Tensor | None

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` micro-batches."""
        pixels = self.pixels.chunk(parts) if self.pixels is not None else [None] * parts
        chunks = zip(self.image_ids.chunk(parts), self.caption_ids.chunk(parts), pixels, strict=False)
        return [Batch(images, captions, part) for images, captions, part in chunks]


class Feed:
    """Shuffled batches over the caption rows of `pairs`.

    Attributes:
        captions: every distinct caption; `caption_ids` index it, so equal captions have equal ids.
        steps: batches in an epoch; a last incomplete one is left out, as in open_clip.
    """

    def __init__(
        self, pairs: Pairs, batch_size: int, seed: int, transform: Transform | None, workers: int
    ) -> None:
        rows = pairs.rows()
        self.captions = list(dict.fromkeys(caption for _, caption in rows))
        position = {caption: index for index, caption in enumerate(self.captions)}
        self._image_of_row = torch.tensor([image for image, _ in rows])
        self._caption_of_row = torch.tensor([position[caption] for _, caption in rows])
        self._batch_size = batch_size
        self._seed = seed
        self._loader = None
        if transform is not None:
            self._loader = PairBatches(pairs, transform, batch_size=batch_size, seed=seed, workers=workers)
        self.steps = len(epoch_batches(len(rows), batch_size, seed, 0))

    def batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """The batches of an epoch from number `start` on."""
        if self._loader is not None:
            for images, _, image_ids, row_ids in self._loader.batches(epoch, start):
                yield Batch(image_ids, self._caption_of_row[row_ids], images)
            return
        for rows in epoch_batches(len(self._image_of_row), self._batch_size, self._seed, epoch)[start:]:
            ids = torch.from_numpy(rows)
            yield Batch(self._image_of_row[ids], self._caption_of_row[ids], None)
