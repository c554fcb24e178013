"""Classification behind `clipgraft train` and `clipgraft eval`: what is read, and what is printed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.cli.common import checking, fit_options, hand_over, load_own_model
from clipgraft.cli.eval import side_by_side
from clipgraft.cli.flags.shared import ClassFlags, DataFlags
from clipgraft.cli.flags.training import ClassTrainFlags
from clipgraft.cli.train import announce, graft
from clipgraft.data.labels import Labelled, class_weights, few_shot, match_classes, split_labelled
from clipgraft.data.labels_read import read_labelled
from clipgraft.data.labels_report import format_label_report
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.errors import CheckpointError
from clipgraft.evaluate.classify import (
    ClassificationResult,
    classification_metrics,
    evaluate_classification,
)
from clipgraft.lora.config import auto_rank
from clipgraft.models.clip import Clip
from clipgraft.text_tables import NOTHING, Table, terminal_width
from clipgraft.train.classes import Head, load_head
from clipgraft.train.distributed import Peers

log = logging.getLogger("clipgraft")
_SHOWN = ("acc1", "acc5", "mean_per_class_recall", "ece", "loss")


@dataclass(frozen=True)
class ClassData:
    """Images to train and to evaluate on, and the prompts of their classes."""

    train: Labelled
    val: Labelled | None
    prompts: tuple[tuple[str, ...], ...]


def read_class_data(data: DataFlags, classes: ClassTrainFlags, seed: int) -> ClassData:
    """Read and check labelled images, with what is held out and what prompts say, and print the summary."""
    assert data.train_data is not None
    train = read_images(data.train_data, data, classes, "training images")
    val = None
    if data.val_data is not None:
        held_out = read_images(data.val_data, data, classes, "validation images", validation=True)
        val = match_classes(held_out, train.classes)
    elif classes.val_size is not None:
        train, val = split_labelled(train, classes.val_size, seed)
        log.info("%d images to train on, %d held out", len(train), len(val))
    if classes.shots is not None:
        train = few_shot(train, classes.shots, seed)
        log.info("%d images to train on: %d shots a class", len(train), classes.shots)
    return ClassData(train, val, prompts_of(train.classes, classes))


def read_images(
    path: Path, data: DataFlags, classes: ClassFlags, what: str, validation: bool = False
) -> Labelled:
    """One set of labelled images, with its summary; `validation` has columns of its own."""
    columns = data.for_validation() if validation else data
    label = (classes.for_validation() if validation else classes).csv_label_key
    with checking(what) as progress:
        images, report = read_labelled(
            path,
            label_key=label,
            **columns.reading,
            strict=data.strict,
            max_bad_rows=data.max_bad_rows,
            workers=data.workers,
            progress=progress,
        )
    log.info("%s", format_label_report(report))
    return images


def prompts_of(names: Sequence[str], classes: ClassFlags) -> tuple[tuple[str, ...], ...]:
    """The prompts of each class, from the YAML and the templates."""
    given = None if classes.prompts is None else read_prompts(classes.prompts)
    return class_prompts(names, given, find_templates(classes.templates))


def train_classifier(specs: Sequence[Any], folder: Path, peers: Peers) -> None:
    """Load what the specs name, and train it into `folder` to tell classes apart; rank 0 reads the data."""
    from clipgraft.train.fit_classes import fit_classifier

    model_spec, data, classes, lora, train, where = specs
    clip = load_own_model(model_spec, peers)
    read = peers.at_root(lambda: read_class_data(data, classes, train.seed))
    if lora.use_lora:
        graft(clip, lora, where, train.seed, lambda: auto_rank(len(read.train), "classification"))
    announce(clip, len(read.train), "images", train, peers.size)
    done = fit_classifier(
        clip,
        read.train,
        read.val,
        prompts=read.prompts,
        out=folder,
        head=classes.head,
        weights=class_weights(read.train) if classes.class_weights else None,
        peers=peers,
        **fit_options(specs),
    )
    if peers.root:
        hand_over(clip, folder, done.metrics or None, done.base)


def measure_classes(
    models: Mapping[str, Clip],
    data: DataFlags,
    classes: ClassFlags,
    classifier: Path | None = None,
    **options: Any,
) -> dict[str, ClassificationResult]:
    """Results of the prompts of each model under its name and of an adapter beside its base, and of a saved
    classifier on the features of the last.

    `options` are what `encode_images` and `evaluate_classification` both take.

    Raises:
        CheckpointError: no classifier in that folder, or one for features of another size.
        DataError: images that cannot be used, or of classes that the classifier does not know.
    """
    assert data.val_data is not None
    head = None if classifier is None else load_head(classifier)
    images = read_images(data.val_data, data, classes, "images", validation=True)
    if head is not None:
        images = match_classes(images, head[1])
    prompts = prompts_of(images.classes, classes)
    latest: list[Tensor] = []

    results: dict[str, ClassificationResult] = {}
    for heading, clip in models.items():

        def judge(features: Tensor, clip: Clip = clip) -> ClassificationResult:
            latest[:] = [features]
            return evaluate_classification(clip, images, prompts, image_features=features, **options)

        for name, result in side_by_side(clip, images.images, judge, **options).items():
            results["adapter" if name == "adapter" else heading] = result
    if head is not None:
        results[head[0].kind] = _judge_head(head[0], latest[0], images, classifier)
    return results


def _judge_head(head: Head, features: Tensor, images: Labelled, folder: Path | None) -> ClassificationResult:
    if features.shape[1] != head.weight.shape[1]:
        raise CheckpointError(
            f"--classifier {folder} takes features of {head.weight.shape[1]} numbers, the model gives "
            f"{features.shape[1]}: give the --model and --adapter that it was trained with"
        )
    with torch.no_grad():
        return classification_metrics(head(features.cpu()), torch.tensor(images.labels), images.classes)


def class_table(columns: Mapping[str, ClassificationResult]) -> str:
    """Metrics with one column a model, and below them the recall of each class; in percent."""
    factors = {metric: 1 if metric == "loss" else 100 for metric in _SHOWN}
    metrics = [
        (metric, *(f"{factor * result.metrics[metric]:.2f}" for result in columns.values()))
        for metric, factor in factors.items()
    ]
    recalls = [
        (
            rows[0].name,
            *(NOTHING if r.recall is None else f"{100 * r.recall:.1f}" for r in rows),
            f"{rows[0].count:,}",
        )
        for rows in zip(*(result.per_class for result in columns.values()), strict=True)
    ]
    tables = (
        Table("", ("", *columns), tuple(metrics)),
        Table("", ("recall of", *columns, "images"), tuple(recalls)),
    )
    return "\n\n".join(table.text(terminal_width()) for table in tables)
