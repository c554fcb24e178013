"""Measure several models on the same data, and an adapter beside its own base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.features import encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.classification import (
    ClassificationResult,
    classification_metrics,
    evaluate_classification,
)
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.lora.control import lora_disabled
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip

_R = TypeVar("_R")


def compare_retrieval(models: Mapping[str, Clip], pairs: Pairs, **options: Any) -> dict[str, Measured]:
    """Measure retrieval with each model under its name; an adapter counts as one, beside its base.

    `options` are what `encode_images` and `evaluate_retrieval` both take.
    """
    autocast = bool(options.get("autocast"))

    def measure(clip: Clip, images: Tensor) -> Measured:
        return measure_retrieval(Encoder(clip, autocast), pairs, images)

    return _each(models, pairs.images, measure, **options)


def compare_classification(
    models: Mapping[str, Clip],
    images: Labelled,
    prompts: Sequence[Sequence[str]],
    head: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> dict[str, ClassificationResult]:
    """Measure zero-shot classification with each model under its name; an adapter counts as one.

    Args:
        models: the models by name.
        images: what is classified.
        prompts: of each class.
        head: gives logits of image features; measured on those of the last model, under the name `head`.
        options: what `encode_images` and `evaluate_classification` both take.
    """
    latest: list[Tensor] = []

    def measure(clip: Clip, features: Tensor) -> ClassificationResult:
        latest[:] = [features]
        return evaluate_classification(clip, images, prompts, image_features=features, **options)

    results = _each(models, images.images, measure, **options)
    if head is not None:
        with torch.no_grad():
            logits = head(latest[0].cpu())
        results["head"] = classification_metrics(logits, torch.tensor(images.labels), images.classes)
    return results


def _each(
    models: Mapping[str, Clip], files: Sequence[Path], measure: Callable[[Clip, Tensor], _R], **options: Any
) -> dict[str, _R]:
    return {
        ("adapter" if name == "adapter" else heading): found
        for heading, clip in models.items()
        for name, found in _beside_base(clip, files, measure, **options).items()
    }


def _beside_base(
    clip: Clip, files: Sequence[Path], measure: Callable[[Clip, Tensor], _R], **options: Any
) -> dict[str, _R]:
    """Measure the base on unit-norm features of images and, where the model carries one, its adapter.

    Images are encoded twice only where the adapter acts on the vision tower.
    """
    state = lora_state(clip)
    if state is None:
        return {"base": measure(clip, encode_images(clip, files, **options))}
    with lora_disabled(clip):
        images = encode_images(clip, files, **options)
        base = measure(clip, images)
    if state.chosen().touches("vision"):
        images = encode_images(clip, files, **options)
    return {"base": base, "adapter": measure(clip, images)}
