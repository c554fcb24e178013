"""Views: random augmentations that are the same for the same image every time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor

from clipgraft.data.loading import Transform, seeded


@dataclass(frozen=True)
class SeededView:
    """One augmentation of every image, drawn from (seed, view, pixels of the image) alone.

    The place of an image in its table, or of its file on disk, plays no part.
    """

    transform: Transform
    seed: int
    view: int

    def __call__(self, image: Image) -> Tensor:
        with seeded(self.seed, self.view, zlib.crc32(image.tobytes())):
            return self.transform(image)
