"""What needs the model: examples of a run, and what it forgot of other data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.classify import (
    ClassificationResult,
    class_features,
    classification_metrics,
    evaluate_classification,
)
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.models.clip import Clip
from clipgraft.report.choose import Side, class_examples, retrieval_examples
from clipgraft.report.examples import Examples
from clipgraft.report.forgotten import Forgotten, Retained
from clipgraft.report.loaded import read_validation_classes, read_validation_pairs, sides
from clipgraft.report.runs import Run
from clipgraft.train.classes import load_head


@dataclass(frozen=True)
class Computing:
    """How features are computed: where, with how many loader workers, and where they are kept."""

    device: torch.device
    workers: int = 2
    cache: FeatureCache | None = None


def compute_examples(run: Run, how: Computing) -> Examples:
    """The examples of a run.

    Raises:
        ClipgraftError: its base, what it saved, or all of its validation data are not there.
    """
    return _classified(run, how) if run.task == "classification" else _retrieved(run, how)


def compute_forgotten(run: Run, retained: Retained, how: Computing) -> Forgotten:
    """What base and adapted model reach on other data.

    Raises:
        ClipgraftError: the base, what the run saved, or the data are not there.
    """
    measured, items = _measure_retained(run, retained, how)
    return Forgotten(retained.task, measured["base"], measured["adapted"], items)


def _measure_retained(
    run: Run, retained: Retained, how: Computing
) -> tuple[dict[str, dict[str, float]], int]:
    evaluate: Callable[[Clip, Encoder], dict[str, float]]
    options = {"workers": how.workers, "cache": how.cache}
    if retained.task == "classification":
        labelled = read_labelled(retained.path, max_bad_rows=None, **retained.keys)  # type: ignore[arg-type]
        given = None if retained.prompts is None else read_prompts(retained.prompts)
        prompts = class_prompts(labelled.classes, given, find_templates(retained.templates))
        items = len(labelled)

        def evaluate(clip: Clip, encoder: Encoder) -> dict[str, float]:
            result = evaluate_classification(clip, labelled, prompts, encoder=encoder, **options)  # type: ignore[arg-type]
            return result.metrics
    else:
        pairs = read_pairs(retained.path, max_bad_rows=None, verify="header", **retained.keys)  # type: ignore[arg-type]
        items = len(pairs)

        def evaluate(clip: Clip, encoder: Encoder) -> dict[str, float]:
            return evaluate_retrieval(clip, pairs, encoder=encoder, **options)  # type: ignore[arg-type]

    return {name: evaluate(clip, _encoder(run, clip)) for name, clip in sides(run, how.device)}, items


def _encoder(run: Run, clip: Clip) -> Encoder:
    """As the run computed, so that its numbers are met again."""
    return Encoder(clip, run.params.get("autocast") is True)


def _retrieved(run: Run, how: Computing) -> Examples:
    pairs, missing = read_validation_pairs(run)
    captions = [caption for _, caption in pairs.rows()]
    made = {}
    for name, clip in sides(run, how.device):
        encoder = _encoder(run, clip)
        images = _image_features(run, clip, pairs.images, encoder, how)
        made[name] = Side(images, encode_captions(clip, captions, encoder=encoder))
    return retrieval_examples(pairs, made, missing)


def _classified(run: Run, how: Computing) -> Examples:
    data = read_validation_classes(run)
    labels = torch.tensor(data.images.labels)
    made: dict[str, Side] = {}
    results: dict[str, ClassificationResult] = {}
    predicted: list[int] = []
    head, names = _head(run)
    if names and names != data.images.classes:
        head = None
    for name, clip in sides(run, how.device):
        encoder = _encoder(run, clip)
        images = _image_features(run, clip, data.images.images, encoder, how)
        made[name] = Side(images, class_features(encoder, data.prompts))
        logits = clip.logit_scale.detach().float().exp().cpu() * images @ made[name].texts.T
        if name == "adapted" and head is not None:
            with torch.no_grad():
                logits = head(images)
        results[name] = classification_metrics(logits, labels, data.images.classes)
        predicted = logits.argmax(1).tolist()
    kind = str(run.params.get("head")) if head is not None else ""
    return class_examples(data.images, made, results, predicted, data.missing, kind)


def _head(run: Run) -> tuple[torch.nn.Module | None, tuple[str, ...]]:
    """The classifier that the run trained, and its classes, if it trained one."""
    folder = run.path / "head"
    return load_head(folder) if folder.is_dir() else (None, ())


def _image_features(
    run: Run, clip: Clip, images: tuple[Path, ...], encoder: Encoder, how: Computing
) -> torch.Tensor:
    return encode_images(
        clip,
        images,
        workers=how.workers,
        encoder=encoder,
        cache=how.cache,
        exact_preprocess=run.params.get("exact_preprocess") is True,
    )
