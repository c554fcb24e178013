"""Turn batches of items into vectors: read images or tokenize texts ahead, and encode them in this process.

`ray_engine.RayEngine` does the same on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgraft.data.features import evaluating
from clipgraft.data.loading import Transform, prefetch
from clipgraft.data.preprocessing import FastPreprocess
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.control import set_adapter
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.pictures import ImageError, open_sized
from clipgraft.search.folder import adapters_as_they_were
from clipgraft.search.items import Item, Ref, is_address, read_at, ref
from clipgraft.search.manifest import Dtype, Kind, VectorSet
from clipgraft.stored_images import image_bytes

_AT_ONCE = 16  # requests to a network, which mostly wait
_THINNEST = 1000  # an image that is this many times as long as wide fills the memory when it is resized


@dataclass(frozen=True)
class Loaded:
    """A batch of B items as the model's inputs, N of them usable.

    Attributes:
        inputs: of images (N, 3, H, W), 8-bit for a `FastPreprocess`, else what the transform makes; of texts
            (N, L) tokens; None where N is 0.
        sizes: (width, height) and bytes in the file of each usable image; none of texts.
        reasons: B reasons why an item is not usable, None for those that are.
    """

    inputs: Tensor | None
    sizes: list[tuple[int, int, int]]
    reasons: list[str | None]


@dataclass(frozen=True)
class ImageModality:
    """Images: read and decoded by worker processes, finished on the model's device."""

    kind: ClassVar[Kind] = "images"
    steps: Transform
    workers: int  # processes that call `load`; 0 is a thread

    def keys(self, root: str, items: Sequence[Item]) -> list[Ref]:
        """Return what a worker needs to load a batch of items."""
        return [ref(root, item) for item in items]

    def load(self, keys: Sequence[Ref]) -> Loaded:
        """Load a batch, in a worker. Raises nothing for an item that cannot be used."""
        pixels: list[Tensor] = []
        sizes: list[tuple[int, int, int]] = []
        reasons: list[str | None] = []
        for content in _contents(keys):
            decoded = content if isinstance(content, str) else self._pixels(content)
            if isinstance(decoded, str):
                reasons.append(decoded)
                continue
            pixels.append(decoded[0])
            sizes.append(decoded[1])
            reasons.append(None)
        return Loaded(torch.stack(pixels) if pixels else None, sizes, reasons)

    def finish(self, encoder: Encoder, inputs: Tensor) -> Tensor:
        """Finish loaded inputs on the model's device."""
        pixels = queued(inputs, encoder.clip.device)
        return self.steps.finish(pixels) if isinstance(self.steps, FastPreprocess) else pixels

    def features(self, encoder: Encoder, inputs: Tensor) -> Tensor:
        return encoder.encode_image(inputs)

    def _pixels(self, content: bytes | Path) -> tuple[Tensor, tuple[int, int, int]] | str:
        step: Callable[[Image.Image], Tensor] = self.steps
        shortest = None
        if isinstance(self.steps, FastPreprocess):
            step, shortest = self.steps.pixels, self.steps.shortest
        try:
            image, (width, height) = open_sized(content, shortest=shortest)
            size = len(content) if isinstance(content, bytes) else image_bytes(content)
        except ImageError as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)
        if max(image.size) > _THINNEST * min(image.size):
            return f"{width}x{height} pixels: too thin to resize; cut it"
        return step(image), (width, height, size)


def _contents(refs: Sequence[Ref]) -> list[bytes | Path | str]:
    """Return the bytes or path of each image, or as text the reason why it cannot be read."""
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


@dataclass(frozen=True)
class TextModality:
    """Texts: tokenized by a thread."""

    kind: ClassVar[Kind] = "texts"
    workers: ClassVar[int] = 0
    steps: ClassVar[None] = None
    clip: Clip

    def keys(self, root: str, items: Sequence[Item]) -> list[str]:
        return [item.key for item in items]

    def load(self, keys: list[str]) -> Loaded:
        tokens = self.clip.tokenize(keys) if keys else None
        return Loaded(tokens, [], [None] * len(keys))

    def finish(self, encoder: Encoder, inputs: Tensor) -> Tensor:
        return inputs

    def features(self, encoder: Encoder, inputs: Tensor) -> Tensor:
        return encoder.encode_text(inputs)


Modality = ImageModality | TextModality


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of B items, N of them usable.

    Attributes:
        sizes, reasons: as in `Loaded`.
        vectors: unit-norm (N, D) by the set's folder, in the type they are kept in; empty where N is 0.
        kernels: attention kernels that were chosen so far.
    """

    sizes: Sequence[tuple[int, int, int]]
    reasons: Sequence[str | None]
    vectors: Mapping[str, Tensor]
    kernels: Mapping[str, str]


@dataclass(frozen=True)
class LocalEngine:
    """This process with the model it holds; the next batches are loaded while it works.

    Attributes:
        encoder: of the model.
        modality: what makes its inputs.
        sets: the folders of vectors to make.
        switch: whether to choose the adapter of each set in turn; else what acts on the model makes them.
        dtype: the type that vectors are kept in.
    """

    encoder: Encoder
    modality: Modality
    sets: tuple[VectorSet, ...]
    switch: bool
    dtype: Dtype

    def encode(self, keys: Iterable[Any], count: int) -> Generator[EncodedBatch, None, None]:
        """Yield one `EncodedBatch` for each of `count` batches, in order; to be closed.

        `keys` are those of a modality, taken as they are needed, by the caller's thread. Vectors stay on the
        model's device.
        """
        clip = self.encoder.clip
        batches = prefetch(self.modality.load, keys, self.modality.workers)
        with evaluating(clip), adapters_as_they_were(clip), closing(batches):
            for batch in batches:
                vectors = self._vectors(batch.inputs)
                yield EncodedBatch(batch.sizes, batch.reasons, vectors, self.encoder.attention.choices)

    def _vectors(self, loaded: Tensor | None) -> dict[str, Tensor]:
        if loaded is None:
            return {}
        vectors, dtype = {}, getattr(torch, self.dtype)
        with torch.inference_mode():
            inputs = self.modality.finish(self.encoder, loaded)
        for part in self.sets:
            if self.switch:
                set_adapter(self.encoder.clip, part.adapter)
            with torch.inference_mode():
                features = self.modality.features(self.encoder, inputs)
                vectors[part.folder] = F.normalize(features.float(), dim=-1).to(dtype)
        return vectors
