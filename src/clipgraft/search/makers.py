"""What turns items of a source into a model's inputs and those into features, for images and for texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipgraft.data.loading import Transform
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.search.decoding import Decoded, Decoder
from clipgraft.search.items import Item, ref


@dataclass(frozen=True)
class Maker:
    """What makes the model's inputs of items, and features of those.

    Attributes:
        key: what of a batch of items goes to the workers.
        make: makes inputs of that, there.
        finish: those inputs to what the model takes, here.
        features: that to features.
        workers: processes; 0 is a thread.
        steps: the preprocessing, None for texts.
    """

    key: Callable[[str, Sequence[Item]], Any]
    make: Callable[[Any], Decoded]
    finish: Callable[[Encoder, Tensor], Tensor]
    features: Callable[[Encoder, Tensor], Tensor]
    workers: int
    steps: Transform | None = None


def image_maker(steps: Transform, workers: int) -> Maker:
    """For images: decoded by processes, finished on the model's device."""
    decoder = Decoder(steps)

    return Maker(
        key=lambda root, items: [ref(root, item) for item in items],
        make=decoder,
        finish=lambda encoder, inputs: decoder.finish(inputs.to(encoder.clip.device)),
        features=lambda encoder, pixels: encoder.encode_image(pixels),
        workers=workers,
        steps=steps,
    )


def text_maker(clip: Clip) -> Maker:
    """For texts: tokenized by a thread."""

    def make(texts: list[str]) -> Decoded:
        tokens = clip.tokenize(texts) if texts else None
        return Decoded(tokens, [], [None] * len(texts))

    return Maker(
        key=lambda _, items: [item.key for item in items],
        make=make,
        finish=lambda _, tokens: tokens,
        features=lambda encoder, tokens: encoder.encode_text(tokens),
        workers=0,
    )
