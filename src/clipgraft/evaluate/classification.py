"""Measure classification by prompts: features to logits, and logits to metrics.

`acc1`, `acc5` and `mean_per_class_recall` are those of CLIP_benchmark. Ties count against the model, as in
`clipgraft.evaluate.metrics`: one that gives all classes the same logit is always wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.prompts import WeightedPrompts
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError, TrainingError
from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.evaluate.metrics import Metrics
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.device import use_autocast
from clipgraft.notebook_tables import Tabled
from clipgraft.progress import Progress
from clipgraft.text_tables import Column, Table, count, share, table_of

CALIBRATION_BINS = 15
_ROWS = 4096  # rows whose float64 copy is made at once


@dataclass(frozen=True)
class ClassRow:
    """One class: `recall` is None where it has no image, `precision` where it is never predicted."""

    name: str
    count: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True, eq=False)
class ClassificationResult(Tabled):
    """Metrics of a classifier, in total and by class.

    Attributes:
        metrics: `acc1`, `acc5`, `mean_per_class_recall`, `loss`, `ece`.
        per_class: one row a class, in the order of the classes.
        confusion: int64 (C, C): how many images of the row's class were taken for the column's.
        correct: bool (N,): which images were given their own class.
        predicted: int64 (N,): the class that each image was given; of equal logits a wrong one.
        confidence: float64 (N,): the probability of the likeliest class.
    """

    metrics: Metrics
    per_class: tuple[ClassRow, ...]
    confusion: Tensor
    correct: Tensor
    predicted: Tensor
    confidence: Tensor

    def table(self) -> Table:
        """The classes, under the metrics of all."""
        rows = ((row.name, row.count, row.recall, row.precision) for row in self.per_class)
        columns = (
            *(Column("class", left=True), Column("images", count)),
            *(Column("recall", share), Column("precision", share)),
        )
        return table_of(repr(self.metrics), columns, rows)

    @property
    def measured(self) -> Measured:
        """The metrics, with the outcome of every image."""
        hits, images = self.correct.numpy(), np.arange(len(self.correct))
        chance = {"acc1": 1 / len(self.per_class)}
        return Measured(dict(self.metrics), Outcomes({"acc1": hits}, {"acc1": images}, chance))


def classification_metrics(
    logits: Tensor, labels: Tensor, classes: Sequence[str], *, sigmoid: bool = False
) -> ClassificationResult:
    """Compute accuracy, loss and calibration of a classifier from logits.

    `acc5` counts the first min(5, C) classes. `mean_per_class_recall` averages over the classes that have an
    image. `loss` is the mean cross-entropy. `ece` is the expected calibration error of the probabilities over
    15 bins of equal width (Guo et al. 2017, *On Calibration of Modern Neural Networks*, eq. 3), bins open
    below.

    Args:
        logits: floating (N, C), temperature included, and the bias of a model that has one.
        labels: integer (N,), indices into `classes`.
        classes: C names.
        sigmoid: a logit is the probability of its class by itself, as of SigLIP, and not by a softmax.

    Raises:
        DataError: there is no image, or the shapes or labels do not fit.
        TrainingError: a logit is NaN or infinite.
    """
    _check(logits, labels, classes)
    logits, labels = logits.detach().cpu(), labels.detach().cpu().long()
    parts = [
        _judge(*part, sigmoid)
        for part in zip(torch.split(logits, _ROWS), torch.split(labels, _ROWS), strict=True)
    ]
    rank, predicted, loss, confidence = (torch.cat(values) for values in zip(*parts, strict=True))
    size = len(classes)
    confusion = torch.bincount(labels * size + predicted, minlength=size * size).view(size, size)
    rows = _per_class(confusion, classes)
    recalls = [row.recall for row in rows if row.recall is not None]
    correct = (rank == 1).double()
    metrics = Metrics(
        {
            "acc1": float(correct.mean()),
            "acc5": float((rank <= min(5, size)).double().mean()),
            "mean_per_class_recall": sum(recalls) / len(recalls),
            "loss": float(loss.mean()),
            "ece": _calibration_error(confidence, correct),
        }
    )
    return ClassificationResult(metrics, rows, confusion, rank == 1, predicted, confidence)


def pool_prompts(features: Tensor, counts: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """Average unit-norm prompt features (P, D), class after class, to unit-norm class features (C, D).

    The mean of each class's prompts, normalised again (Radford et al. 2021, *Learning Transferable Visual
    Models From Natural Language Supervision*, section 3.1.4). `counts` says how many prompts each class has,
    and `weights`, (P,), how much each of them counts; None for all alike. Gradients flow.
    """
    if weights is not None:
        features = features * weights[:, None]
    means = torch.stack([part.mean(0) for part in torch.split(features, list(counts))])
    return F.normalize(means, dim=-1)


def prompt_weights(prompts: Sequence[Sequence[str]]) -> Tensor | None:
    """Return the weights of all prompts, class after class, fp32 (P,), or None where all weigh alike.

    Those of a class are 1 on average.
    """
    if not any(isinstance(group, WeightedPrompts) for group in prompts):
        return None
    found: list[float] = []
    for group in prompts:
        weights = group.weights if isinstance(group, WeightedPrompts) else (1.0,) * len(group)
        mean = math.fsum(weights) / len(weights)
        found += [weight / mean for weight in weights]
    return torch.tensor(found)


def class_features(
    model: Encoder | ClipLike, prompts: Sequence[Sequence[str]], *, batch_size: int = 256
) -> Tensor:
    """Encode the prompts of classes as unit-norm fp32 features (C, D) on the CPU, without gradients.

    Args:
        model: a `Clip`, a raw model, or the `Encoder` to use.
        prompts: one or more of each class.
        batch_size: prompts encoded at once.

    Raises:
        DataError: a class without a prompt.
    """
    empty = [index for index, texts in enumerate(prompts) if not texts]
    if empty or not prompts:
        raise DataError(f"class {empty[0] if empty else 0} has no prompt; give each class at least one")
    encoder = model if isinstance(model, Encoder) else Encoder(as_clip(model))
    texts = [text for group in prompts for text in group]
    features = encode_captions(encoder.clip, texts, batch_size=batch_size, encoder=encoder)
    return pool_prompts(features, [len(group) for group in prompts], prompt_weights(prompts))


def evaluate_classification(
    model: ClipLike,
    data: Labelled,
    prompts: Sequence[Sequence[str]],
    features: FeatureArgs | None = None,
    *,
    batch_size: int = 64,
    image_features: Tensor | None = None,
    prototypes: Tensor | None = None,
    cache: FeatureCache | None = None,
    progress: Progress = None,
    **options: Any,
) -> ClassificationResult:
    """Classify the images of `data` by the prompts of each class: zero-shot, or with the model's adapter.

    Logits are cosines at the model's own temperature. `ece` is of sigmoids if it has a `logit_bias`.

    Args:
        model: a `Clip` or a raw model.
        data: images and labels.
        prompts: of each of `data.classes`, as `clipgraft.data.prompts.class_prompts` makes them.
        features: how images become features, and where those are kept, unless LoRA acts on the image tower.
        batch_size: images encoded at once.
        image_features: unit-norm (N, D) features of `data.images`, where they are known already.
        prototypes: unit-norm (C, D) features of the classes, where they are known already.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).
        cache: an open feature cache, in place of the one that `features` names.
        **options: single fields of `FeatureArgs`, such as `workers=0`, in place of those of `features`.

    Raises:
        DataError: prompts and classes differ in number, or an image cannot be used.
    """
    _check_prompts(prompts, data)
    clip = as_clip(model)
    features = (features or FeatureArgs()).replace(**options)
    encoder = Encoder(clip, use_autocast(features.autocast, clip.device))
    if image_features is None:
        image_features = encode_images(
            clip,
            data.images,
            features,
            batch_size=batch_size,
            encoder=encoder,
            cache=cache,
            progress=progress,
        )
    return measure_classification(encoder, data, prompts, image_features, prototypes)


def measure_classification(
    encoder: Encoder,
    data: Labelled,
    prompts: Sequence[Sequence[str]],
    image_features: Tensor,
    prototypes: Tensor | None = None,
) -> ClassificationResult:
    """Compute the result of `evaluate_classification` from image features."""
    _check_prompts(prompts, data)
    if prototypes is None:
        prototypes = class_features(encoder, prompts)
    clip = encoder.clip
    logits = prompt_logits(clip, image_features.float().cpu(), prototypes)
    labels, sigmoid = torch.tensor(data.labels), clip.logit_bias is not None
    return classification_metrics(logits, labels, data.classes, sigmoid=sigmoid)


def prompt_logits(clip: Clip, images: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines of unit-norm (N, D) and (C, D) on the CPU at a model's temperature, plus its `logit_bias`."""
    logits = clip.logit_scale.detach().float().exp().cpu() * images @ prototypes.T
    return logits if clip.logit_bias is None else logits + clip.logit_bias.detach().float().cpu()


def _check_prompts(prompts: Sequence[Sequence[str]], data: Labelled) -> None:
    if len(prompts) != len(data.classes):
        raise DataError(f"prompts of {len(prompts)} classes for {len(data.classes)} classes; give all theirs")


def _check(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] != len(classes):
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, {len(classes)} classes"
        raise DataError(f"{shapes} do not fit: pass (N, C) logits, (N,) labels and C names")
    if not len(labels) or not classes:
        raise DataError("no image to average over: pass at least one row and one class")
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, outside 0..{len(classes) - 1}"
        )
    broken = (~logits.isfinite()).any(1).nonzero()
    if len(broken):
        raise TrainingError(
            f"logits hold NaN or infinity in {len(broken)} of {len(logits)} rows (first: row "
            f"{int(broken[0])}): the model diverged or overflowed; lower the learning rate or use fp32/bf16."
        )


def _judge(logits: Tensor, labels: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for (n, C) logits, (n,) each: rank of the true class, prediction, cross-entropy, confidence."""
    logits, columns = logits.double(), labels[:, None]
    own = logits.gather(1, columns)
    others = logits.scatter(1, columns, -torch.inf)
    rank = 1 + (others >= own).sum(1)
    predicted = torch.where(rank == 1, labels, others.argmax(1))
    logarithms = logits.log_softmax(1)
    loss = -logarithms.gather(1, columns)[:, 0]
    confidence = logits.max(1).values.sigmoid() if sigmoid else logarithms.max(1).values.exp()
    return rank, predicted, loss, confidence


def _per_class(confusion: Tensor, classes: Sequence[str]) -> tuple[ClassRow, ...]:
    right, shown = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    guessed = confusion.sum(0).tolist()
    return tuple(
        ClassRow(name, count, hits / count if count else None, hits / times if times else None)
        for name, hits, count, times in zip(classes, right, shown, guessed, strict=True)
    )


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidence, edges)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return float(gap.abs().sum()) / len(confidence)
