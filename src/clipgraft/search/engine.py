"""`Engine`: batches of a source's items in, their vectors out, in the same order; here, or on a cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.features import evaluating
from clipgraft.data.loading import made_ahead
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.control import set_adapter
from clipgraft.search.decoding import Decoded
from clipgraft.search.makers import Maker
from clipgraft.search.manifest import VectorSet
from clipgraft.search.sets import adapters_as_they_were


@dataclass(frozen=True)
class Encoded:
    """A batch of B items, N of them usable.

    Attributes:
        sizes: (width, height) and bytes in the file of each usable image; none of texts.
        reasons: B reasons why an item is not usable, None for those that are.
        vectors: unit-norm (N, D) by the set's folder, in the type they are kept in; empty where N is 0.
        kernels: attention kernels that were chosen so far.
    """

    sizes: Sequence[tuple[int, int, int]]
    reasons: Sequence[str | None]
    vectors: Mapping[str, Tensor]
    kernels: Mapping[str, str]


class Engine(Protocol):
    """Whatever encodes batches."""

    def encode(self, keys: Iterable[Any], count: int) -> Generator[Encoded, None, None]:
        """One `Encoded` for each of `count` batches, in order; to be closed.

        `keys` are those of a `Maker`, taken as they are needed, by the caller's thread.
        """


@dataclass(frozen=True)
class LocalEngine:
    """This process with the model it holds; the next batches are decoded while it works.

    Attributes:
        encoder: of the model.
        maker: what makes its inputs.
        sets: the folders of vectors to make.
        switch: whether to choose the adapter of each set in turn; else what acts on the model makes them.
        dtype: what vectors are kept in.
    """

    encoder: Encoder
    maker: Maker
    sets: tuple[VectorSet, ...]
    switch: bool
    dtype: torch.dtype

    def encode(self, keys: Iterable[Any], count: int) -> Generator[Encoded, None, None]:
        """See `Engine`. Vectors stay on the model's device."""
        clip = self.encoder.clip
        inputs = made_ahead(self.maker.make, keys, self.maker.workers)
        with evaluating(clip), adapters_as_they_were(clip), closing(inputs):
            for decoded in inputs:
                vectors = self._vectors(decoded)
                yield Encoded(decoded.sizes, decoded.reasons, vectors, self.encoder.attention.choices)

    def _vectors(self, decoded: Decoded) -> dict[str, Tensor]:
        if decoded.inputs is None:
            return {}
        vectors = {}
        with torch.inference_mode():
            inputs = self.maker.finish(self.encoder, decoded.inputs)
        for part in self.sets:
            if self.switch:
                set_adapter(self.encoder.clip, part.adapter)
            with torch.inference_mode():
                features = self.maker.features(self.encoder, inputs)
                vectors[part.folder] = F.normalize(features.float(), dim=-1).to(self.dtype)
        return vectors
