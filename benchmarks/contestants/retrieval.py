"""Recall over made-up features with the two libraries that build the whole similarity matrix."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import reset_peak

_WIDTH, _NOISE, _BATCH = 512, 5.5, 64


def made_up_features(
    rows: int, images: int, captions_an_image: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make unit-norm features of images and captions, and each caption's image; recall is mid-range.

    Where there are more images than captions need, the last ones have none and only distract.
    """
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(rows) // captions_an_image
    image_features = torch.nn.functional.normalize(torch.randn(images, _WIDTH, generator=generator), dim=-1)
    text_features = torch.randn(rows, _WIDTH, generator=generator).mul_(_NOISE / _WIDTH**0.5)
    text_features += image_features[owner]
    return image_features, torch.nn.functional.normalize(text_features, dim=-1), owner


def by_clip_benchmark(rows: int, images: int, captions_an_image: int, seed: int) -> dict[str, Any]:
    """Run CLIP_benchmark's `zeroshot_retrieval.evaluate` with a model that looks features up."""
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    image_features, text_features, _ = made_up_features(rows, images, captions_an_image, seed)
    captions = torch.arange(rows).view(images, captions_an_image).tolist()
    batches = [
        (image_features[start : start + _BATCH], captions[start : start + _BATCH])
        for start in range(0, images, _BATCH)
    ]
    reset_peak()
    started = time.perf_counter()
    metrics = evaluate(
        _LookUp(text_features), batches, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    return {"seconds": time.perf_counter() - started, "metrics": metrics}


def by_open_clip(rows: int, images: int, captions_an_image: int, seed: int) -> dict[str, Any]:
    """Run open_clip_train's `get_clip_metrics`, which knows one caption an image."""
    from open_clip_train.train import get_clip_metrics

    image_features, text_features, _ = made_up_features(rows, images, captions_an_image, seed)
    reset_peak()
    started = time.perf_counter()
    metrics = get_clip_metrics(image_features, text_features, torch.tensor(1.0))
    return {
        "seconds": time.perf_counter() - started,
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


class _LookUp:
    """A model whose images are features and whose captions are row numbers."""

    def __init__(self, text_features: Tensor) -> None:
        self._text_features = text_features

    def encode_image(self, features: Tensor) -> Tensor:
        return features

    def encode_text(self, rows: Tensor) -> Tensor:
        return self._text_features[rows]
