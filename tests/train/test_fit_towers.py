"""Adapters of towers of transformers, of the user's own, and of a tower alone learn, and are measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.errors import ConfigError, DataError, ModelError
from clipgraft.models import DualEncoder, FeatureTable
from clipgraft.models.clip import as_clip
from fitting import groups
from tiny_dual import DIM, LENGTH, PAIRS, SIZE, build, padding_of
from tiny_pictures import write_pictures

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "pink", "grey"]


class Words:
    """A tokenizer of a few words: each is an id, and the rest is padding."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids = torch.full((len(texts), LENGTH), self.padding)
        for row, text in enumerate(texts):
            words = [10 + COLOURS.index(word) if word in COLOURS else 5 for word in text.split()]
            ids[row, : len(words) + 1] = torch.tensor([*words, 99])
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 1 for text in texts]


def preprocess(image: Any) -> Tensor:
    values = torch.tensor(list(image.resize((SIZE, SIZE)).tobytes()), dtype=torch.float32)
    return values.view(SIZE, SIZE, 3).permute(2, 0, 1) / 128 - 1


@pytest.fixture
def pairs(tmp_path: Path) -> cg.Pairs:
    images = write_pictures(tmp_path / "images", COLOURS)
    return cg.Pairs(images, [(f"a {colour} one",) for colour in COLOURS])


def ready(name: str) -> cg.Clip:
    clip = cg.Clip.over(as_clip(build(name)))
    clip.tokenizer, clip.preprocess = Words(padding_of(name)), preprocess
    return clip


def run(clip: Any, pairs: cg.Pairs, out: Path, **options: Any) -> list[float]:
    """The training loss of every epoch."""
    found = groups(out=out, batch_size=8, lr=1e-2, epochs=6, warmup=0, wd=0.0, workers=0, **options)
    result = cg.fit(clip, pairs, **found)
    return [epoch["train_loss"] for epoch in result.history if "train_loss" in epoch]
