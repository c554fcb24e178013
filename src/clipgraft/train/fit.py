"""Train a model on pairs, on labelled images, on translations, or from a larger model: one call each."""

from __future__ import annotations

from collections.abc import Sequence

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.retained import Retained
from clipgraft.data.translations import Translations
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.train.args import DistillArgs, HeadArgs, RunArgs, TrainArgs, TranslateArgs
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.recipes.classification import ClassificationRecipe
from clipgraft.train.recipes.contrastive import ContrastiveRecipe
from clipgraft.train.recipes.distillation import DistillationRecipe
from clipgraft.train.recipes.translation import TranslationRecipe
from clipgraft.train.run import FitResult, run_recipe

_TRAIN, _FEATURES, _HEAD, _DISTILL = TrainArgs(), FeatureArgs(), HeadArgs(), DistillArgs()
_TRANSLATE = TranslateArgs()


def fit(
    model: ClipLike,
    pairs: Pairs,
    val: Pairs | None = None,
    *,
    run: RunArgs,
    train: TrainArgs = _TRAIN,
    features: FeatureArgs = _FEATURES,
    retain: Retained | None = None,
    world: World = ALONE,
) -> FitResult:
    """Train a model's adapter on pairs, or the model itself if it carries none.

    A tower in which nothing trains and whose input is deterministic is encoded once, before the first step.

    Args:
        model: a `Clip` with tokenizer and preprocessing; `apply_lora` first to train an adapter.
        pairs: images and captions to train on.
        val: images and captions to evaluate on.
        run: the run folder, and what is kept in it.
        train: optimisation: epochs, learning rate, batches.
        features: how images are decoded, and where features of a frozen image tower are kept for other runs.
        retain: texts on which the model is to stay as its base is (`clipgraft.data.retained_texts`).
        world: the processes that train together, each of which calls this (`clipgraft.train.launch`).

    Raises:
        AdapterError: adapters are merged into the base, or none is active.
        ConfigError: options that do not go together, nothing to train, or the folder holds another run.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    return run_recipe(model, ContrastiveRecipe(pairs, val, retain), train, run, features, world)


def fit_classifier(
    model: ClipLike,
    images: Labelled,
    val: Labelled | None = None,
    *,
    prompts: Sequence[Sequence[str]],
    run: RunArgs,
    head: HeadArgs = _HEAD,
    train: TrainArgs = _TRAIN,
    features: FeatureArgs = _FEATURES,
    retain: Retained | None = None,
    world: World = ALONE,
) -> FitResult:
    """Train a model to tell classes apart: cross-entropy over their prompts, or over a head.

    Args:
        model: a `Clip` with tokenizer and preprocessing; `apply_lora` first to train an adapter.
        images: labelled images to train on.
        val: labelled images of the same classes to evaluate on.
        prompts: one or more of each class (`clipgraft.data.prompts.class_prompts`).
        head: what tells classes apart: their `prompts`, encoded once a step, or once if the text tower is
            frozen; or a `linear` or `cosine` classifier on image features that starts as the prompts say. A
            head is saved in `head/` of the run folder.
        run, train, features, retain, world: as for `fit`.

    Raises:
        ConfigError: as for `fit`, or a text tower that trains beside a head.
        DataError: fewer images than one batch, a class without prompt, or other classes in `val`.
        AdapterError, TrainingError, Interrupted: as for `fit`.
    """
    recipe = ClassificationRecipe(images, val, prompts, head, retain)
    return run_recipe(model, recipe, train, run, features, world)


def fit_translations(
    model: ClipLike,
    translations: Translations,
    val: Translations | None = None,
    *,
    run: RunArgs,
    pairs: Pairs | None = None,
    val_pairs: Pairs | None = None,
    options: TranslateArgs = _TRANSLATE,
    train: TrainArgs = _TRAIN,
    features: FeatureArgs = _FEATURES,
    retain: Retained | None = None,
    world: World = ALONE,
) -> FitResult:
    """Train a text tower to give for translations what its base gives for their sources.

    No picture is needed: the image tower is never run without `pairs` or `val_pairs`. Source texts are
    trained on as well, to stay as they are.

    Args:
        model: a `Clip` with a tokenizer; `apply_lora` on text sites first to train an adapter. Without
            pictures it may be a text tower alone.
        translations: texts that the base understands, with their translations
            (`clipgraft.data.read_translations`).
        val: others, to evaluate on: do translations find their sources, and how near are they?
        pairs: images with captions to train on too, in any number.
        val_pairs: images with captions to evaluate on; the best epoch is then the best on these.
        options: how much translations count beside pairs.
        run, train, features, retain, world: as for `fit`.

    Raises:
        ConfigError: as for `fit`, or the text tower is frozen, or the image tower is to train.
        AdapterError, DataError, TrainingError, Interrupted: as for `fit`.
    """
    recipe = TranslationRecipe(translations, val, pairs, val_pairs, options, retain)
    return run_recipe(model, recipe, train, run, features, world)


def distill(
    student: ClipLike,
    teacher: ClipLike,
    pairs: Pairs,
    val: Pairs | None = None,
    *,
    run: RunArgs,
    weights: DistillArgs = _DISTILL,
    train: TrainArgs = _TRAIN,
    features: FeatureArgs = _FEATURES,
    world: World = ALONE,
) -> FitResult:
    """Train a student, its adapter or all of it, on pairs and on what a teacher makes of them.

    The loss is `contrastive` times that of `fit`, `feature` times the cosine distance to the teacher's
    features, and `similarity` times the divergence from its similarities in the batch. The teacher runs once
    over images and captions, as it is when this is called, and never again.

    Args:
        student: what trains, in place: a `Clip` with tokenizer and preprocessing.
        teacher: another model, of any tokenizer, preprocessing and size.
        pairs, val: as for `fit`. With `augment` the student sees crops of images whose whole the teacher saw.
        weights: how much each term of the loss counts, 0 to leave one out.
        run, train, features, world: as for `fit`.

    Raises:
        ConfigError: as for `fit`, or features of two sizes with `feature` above 0.
        AdapterError, DataError, TrainingError, Interrupted: as for `fit`.
    """
    recipe = DistillationRecipe(as_clip(teacher), pairs, val, weights)
    return run_recipe(student, recipe, train, run, features, world)
