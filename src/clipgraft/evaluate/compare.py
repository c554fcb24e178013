"""Measure several models on the same data, and an adapter beside its own base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.answers import CaptionAnswers, caption_answers
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.classification import (
    ClassificationResult,
    classification_metrics,
    evaluate_classification,
)
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.lora.control import lora_disabled
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip

_R = TypeVar("_R")


def compare_retrieval(
    models: Mapping[str, Clip],
    pairs: Pairs,
    features: FeatureArgs,
    batch_size: int = 64,
    answers: dict[str, CaptionAnswers] | None = None,
) -> dict[str, Measured]:
    """Measure retrieval with each model under its name; an adapter counts as one, beside its base.

    `features` say how images become features, `batch_size` how many are encoded at once. `answers` is filled
    with what each model answers for every image.
    """
    listed: list[CaptionAnswers] = []

    def measure(clip: Clip, images: Tensor) -> Measured:
        encoder = Encoder(clip, bool(features.autocast))
        if answers is None:
            return measure_retrieval(encoder, pairs, images)
        captions = [caption for group in pairs.captions for caption in group]
        texts = encode_captions(clip, captions, encoder=encoder)
        owner = torch.tensor([index for index, group in enumerate(pairs.captions) for _ in group])
        listed.append(caption_answers(images, texts, owner, retrieval_ranks(images, texts, owner)))
        return measure_retrieval(encoder, pairs, images, texts)

    found = each_model(models, pairs.images, features, batch_size, measure)
    if answers is not None:
        answers.update(zip(found, listed, strict=True))
    return found


def compare_classification(
    models: Mapping[str, Clip],
    images: Labelled,
    prompts: Sequence[Sequence[str]],
    features: FeatureArgs,
    batch_size: int = 64,
    head: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, ClassificationResult]:
    """Measure zero-shot classification with each model under its name; an adapter counts as one.

    Args:
        models: the models by name.
        images: what is classified.
        prompts: of each class.
        features: how images become features.
        batch_size: images encoded at once.
        head: gives logits of image features; measured on those of the last model, under the name `head`.
    """
    latest: list[Tensor] = []

    def measure(clip: Clip, found: Tensor) -> ClassificationResult:
        latest[:] = [found]
        return evaluate_classification(clip, images, prompts, features, image_features=found)

    results = each_model(models, images.images, features, batch_size, measure)
    if head is not None:
        with torch.no_grad():
            logits = head(latest[0].cpu())
        results["head"] = classification_metrics(logits, torch.tensor(images.labels), images.classes)
    return results


def each_model(
    models: Mapping[str, Clip],
    files: Sequence[Path],
    features: FeatureArgs,
    batch_size: int,
    measure: Callable[[Clip, Tensor], _R],
) -> dict[str, _R]:
    """Measure each model on unit-norm features of images, and an adapter that it carries beside its base.

    Images are encoded twice only where the adapter acts on the vision tower.
    """
    found: dict[str, _R] = {}
    for name, clip in models.items():
        encode = partial(encode_images, clip, files, features, batch_size=batch_size)
        state = lora_state(clip)
        if state is None:
            found[name] = measure(clip, encode())
            continue
        with lora_disabled(clip):
            images = encode()
            found[name] = measure(clip, images)
        if state.chosen().touches("vision"):
            images = encode()
        found["adapter"] = measure(clip, images)
    return found
