"""From places of images to pixels, in processes or a thread; what cannot be used says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipgraft.data.loading import Transform
from clipgraft.data.preprocessing import FastPreprocess
from clipgraft.pictures import ImageError, open_sized
from clipgraft.search.items import Ref, is_address
from clipgraft.search.remote import read_at

_AT_ONCE = 16  # requests to a network, which mostly wait
_THINNEST = 1000  # an image that is this many times as long as wide fills the memory when it is resized


@dataclass(frozen=True)
class Decoded:
    """A batch of B images, N of them usable.

    Attributes:
        inputs: (N, 3, H, W), 8-bit for a `FastPreprocess`, else what the transform makes; None without any.
        sizes: (width, height) and bytes in the file of each usable image.
        reasons: B reasons why an image is not usable, None for those that are.
    """

    inputs: Tensor | None
    sizes: list[tuple[int, int, int]]
    reasons: list[str | None]


@dataclass(frozen=True)
class Decoder:
    """Makes batches of pixels; goes to worker processes."""

    steps: Transform

    def __call__(self, refs: Sequence[Ref]) -> Decoded:
        """The images at some places. Raises nothing for an image that cannot be used."""
        pixels: list[Tensor] = []
        sizes: list[tuple[int, int, int]] = []
        reasons: list[str | None] = []
        for content in _contents(refs):
            made = content if isinstance(content, str) else self._pixels(content)
            if isinstance(made, str):
                reasons.append(made)
                continue
            pixels.append(made[0])
            sizes.append(made[1])
            reasons.append(None)
        return Decoded(torch.stack(pixels) if pixels else None, sizes, reasons)

    def finish(self, inputs: Tensor) -> Tensor:
        """What the model takes."""
        return self.steps.finish(inputs) if isinstance(self.steps, FastPreprocess) else inputs

    def _pixels(self, content: bytes | Path) -> tuple[Tensor, tuple[int, int, int]] | str:
        step: Callable[[Image.Image], Tensor] = self.steps
        shortest = None
        if isinstance(self.steps, FastPreprocess):
            step, shortest = self.steps.pixels, self.steps.shortest
        try:
            image, (width, height) = open_sized(content, shortest=shortest)
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
        except ImageError as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)
        if max(image.size) > _THINNEST * min(image.size):
            return f"{width}x{height} pixels: too thin to resize; cut it"
        return step(image), (width, height, size)


def _contents(refs: Sequence[Ref]) -> list[bytes | Path | str]:
    """The bytes or path of each image; as text why there is none."""
    if not any(is_address(part.location) for part in refs):
        return [_content(part) for part in refs]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_content, refs))


def _content(part: Ref) -> bytes | Path | str:
    if is_address(part.location):
        try:
            return read_at(part)
        # File systems raise errors of their own; the reason is passed on with the image, never dropped.
        except Exception as error:
            return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    if part.offset is None:
        return Path(part.location)
    try:
        with Path(part.location).open("rb") as file:
            file.seek(part.offset)
            return file.read(part.size or 0)
    except OSError as error:
        return error.strerror or str(error)
