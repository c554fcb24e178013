"""The few-shot modes that train towers: CLIP-LoRA, and 2SFS in two stages, each by the one loop.

Zanella & Ben Ayed 2024, *Low-Rank Few-Shot Adaptation of Vision-Language Models* (arXiv:2405.18541).
Farina et al. 2025, *Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages*
(arXiv:2503.11609). Both use one set of hyperparameters for everything, and choose nothing on other images.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.augmentation import crop_and_flip
from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_images
from clipgraft.evaluate.classification import classification_metrics, evaluate_classification
from clipgraft.evaluate.head import Head
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.inject import apply_lora, remove_lora
from clipgraft.lora.state import count_parameters
from clipgraft.models.clip import Clip
from clipgraft.train.args import HeadArgs, RunArgs, TrainArgs
from clipgraft.train.inputs import CACHE_VIEWS
from clipgraft.train.loop import running_statistics
from clipgraft.train.recipes.classification import ClassificationRecipe
from clipgraft.train.run import FitResult, run_recipe
from clipgraft.train.run_folder import started

log = logging.getLogger("clipgraft")
Prompts: TypeAlias = Sequence[Sequence[str]]
STEPS_PER_SHOT = {"clip-lora": 500, "2sfs": 300}
CLIP_LORA = LoraConfig(r=2, alpha=1, dropout=0.25, use_rslora=True, targets="*.*.q+k+v")
"""The published code scales updates by alpha/√r."""
_FIRST_STAGE = 0.6  # of the steps of 2SFS
_CHECKPOINT = 500  # steps
_TRAIN = TrainArgs(
    batch_size=32,
    lr=2e-4,
    wd=1e-2,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    warmup=0,
    lr_scheduler="cosine",
    lr_end=1e-6,
    augment=True,
)


@dataclass(frozen=True)
class OnClasses:
    """Images to measure on, and the prompts of their classes; `trained` tells whether it trained on them."""

    images: Labelled
    prompts: Prompts
    trained: bool = True


@dataclass(frozen=True)
class Job:
    """One training of a mode.

    Attributes:
        few: the images to train on.
        prompts: of their classes.
        steps: in all.
        seed: of weights, order, dropout and crops.
        folder: where its runs are kept, and go on from.
        features: how images become features.
    """

    few: Labelled
    prompts: Prompts
    steps: int
    seed: int
    folder: Path
    features: FeatureArgs


Measure: TypeAlias = Callable[[OnClasses], float]


@dataclass(frozen=True)
class Tuned:
    """What a training made: how many weights changed in how many seconds, and the accuracy on any classes."""

    weights: int
    seconds: float
    accuracy: Measure


@contextlib.contextmanager
def tuned_by_clip_lora(clip: Clip, job: Job) -> Iterator[Tuned]:
    """Train rank-2 updates of q, k and v in both towers; after the block the model is the base again.

    The adapter is kept in `run/adapter` of the job's folder.

    Raises:
        ConfigError: a preprocessing that is not known to crop by.
        DataError, TrainingError, Interrupted: as `fit_classifier`.
    """
    torch.manual_seed(job.seed)
    apply_lora(clip, CLIP_LORA)
    try:
        done = _train(clip, job, job.folder / "run", job.steps)
        weights = count_parameters(clip).trainable
        yield Tuned(weights, done.seconds, lambda test: _by_prompts(clip, test, job.features))
    finally:
        remove_lora(clip)


@contextlib.contextmanager
def tuned_by_two_stages(clip: Clip, job: Job) -> Iterator[Tuned]:
    """Train the layer norms of both towers, then, on what they give, a cosine classifier from the prompts.

    Classes that were trained on are answered by the classifier, others by the tuned text tower. After the
    block the model is the base again; both runs, with the tuned model and the classifier, stay in the job's
    folder.

    Raises:
        ConfigError, DataError, TrainingError, Interrupted: as `tuned_by_clip_lora`.
    """
    with _restored(clip):
        first = max(1, int(job.steps * _FIRST_STAGE))
        norms = _train(clip, job, job.folder / "norms", first, norms_only=True)
        weights = count_parameters(clip).trainable
        head, seconds = _train_classifier(clip, job, max(1, job.steps - first))

        def accuracy(test: OnClasses) -> float:
            return (
                _by_head(clip, head, test.images, job.features)
                if test.trained
                else _by_prompts(clip, test, job.features)
            )

        yield Tuned(weights + head.weight.numel(), norms.seconds + seconds, accuracy)


def _train_classifier(clip: Clip, job: Job, steps: int) -> tuple[Head, float]:
    """Train a classifier on what the model gives, which stays as it is and is kept by the run before.

    Also returns the seconds that it took.
    """
    recipe = ClassificationRecipe(job.few, None, job.prompts, HeadArgs(head="cosine"))
    with _unsaid(CACHE_VIEWS):  # the protocol crops anew
        done = _run(clip, job, recipe, job.folder / "classifier", steps, lock_image=True, lock_text=True)
    shutil.rmtree(done.saved) if done.saved.is_dir() else done.saved.unlink()
    assert recipe.head is not None
    return recipe.head, done.seconds


def _train(clip: Clip, job: Job, folder: Path, steps: int, **options: bool) -> FitResult:
    """Train what is trainable of the model on the prompts of the classes."""
    recipe = ClassificationRecipe(job.few, None, job.prompts, HeadArgs())
    return _run(clip, job, recipe, folder, steps, **options)


def _run(
    clip: Clip, job: Job, recipe: ClassificationRecipe, folder: Path, steps: int, **options: bool
) -> FitResult:
    """Run or resume one stage."""
    cropping = replace(clip, preprocess_train=crop_and_flip(clip.require_preprocess()))
    run = RunArgs(
        out=folder,
        resume=started(folder),
        save_frequency=0,
        strength="none",
        checkpoint_steps=_CHECKPOINT,
        track=(),
    )
    train = _TRAIN.replace(steps=steps, seed=job.seed, **options)
    return run_recipe(cropping, recipe, train, run, job.features)


@contextlib.contextmanager
def _unsaid(advice: str) -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return record.msg != advice

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


@contextlib.contextmanager
def _restored(clip: Clip) -> Iterator[None]:
    """Put the layer norms back as they were, running statistics of batch norms, and what is trainable."""
    norms: list[Tensor] = [p for norm in clip.family.norms(clip.model).values() for p in norm.parameters()]
    changing = [*norms, *running_statistics(clip.model)]
    before = [tensor.detach().clone() for tensor in changing]
    trainable = [(parameter, parameter.requires_grad) for parameter in clip.model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)


def _by_prompts(clip: Clip, test: OnClasses, features: FeatureArgs) -> float:
    return evaluate_classification(clip, test.images, test.prompts, features).metrics["acc1"]


def _by_head(clip: Clip, head: Head, test: Labelled, features: FeatureArgs) -> float:
    images: Tensor = encode_images(clip, test.images, features)
    with torch.no_grad():
        logits = head(images.to(head.weight.device))
    return classification_metrics(logits, torch.tensor(test.labels), test.classes).metrics["acc1"]
