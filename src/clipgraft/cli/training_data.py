"""Read what `clipgraft train` or all cells of a sweep train on, give its recipe, measure a model on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clipgraft.cli.flags.shared import DataFlags
from clipgraft.cli.flags.training import ClassTrainFlags, RetainFlags, TranslateFlags
from clipgraft.cli.read_data import prompts_of, read_images, read_table
from clipgraft.data.args import FeatureArgs, TableArgs, TranslationArgs
from clipgraft.data.datasets import Labelled, Pairs, class_weights, few_shot, match_classes, split_labelled
from clipgraft.data.retained import Retained, read_retained
from clipgraft.data.translations import Translations, read_translations, split_translations, tell_tokens
from clipgraft.evaluate.classification import evaluate_classification
from clipgraft.evaluate.metrics import TaskName
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.models.clip import Clip
from clipgraft.options import part
from clipgraft.train.args import HeadArgs, TranslateArgs
from clipgraft.train.recipes.classification import ClassificationRecipe
from clipgraft.train.recipes.contrastive import ContrastiveRecipe
from clipgraft.train.recipes.recipe import Recipe
from clipgraft.train.recipes.translation import TranslationRecipe

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class PairData:
    """Images and captions to train, validate and test on; other processes get a copy."""

    train: Pairs
    val: Pairs | None
    test: Pairs | None

    task: ClassVar[TaskName] = "retrieval"
    unit: ClassVar[str] = "pairs"

    @property
    def rows(self) -> int:
        return sum(len(captions) for captions in self.train.captions)

    def recipe(self, retain: Retained | None = None) -> Recipe:
        """What trains a model on them."""
        return ContrastiveRecipe(self.train, self.val, retain)

    def validate(self, clip: Clip, features: FeatureArgs) -> dict[str, float]:
        return {} if self.val is None else evaluate_retrieval(clip, self.val, features)

    def tested(self, clip: Clip, features: FeatureArgs) -> dict[str, float]:
        """Measure on the test data, with names that begin with `test_`; nothing without such data."""
        found = {} if self.test is None else evaluate_retrieval(clip, self.test, features)
        return {f"test_{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class ClassData:
    """Labelled images to train, validate and test on, with the prompts of their classes."""

    train: Labelled
    val: Labelled | None
    test: Labelled | None
    prompts: tuple[Sequence[str], ...]
    head: HeadArgs

    task: ClassVar[TaskName] = "classification"
    unit: ClassVar[str] = "images"

    @property
    def rows(self) -> int:
        return len(self.train)

    def recipe(self, retain: Retained | None = None) -> Recipe:
        """What trains a model on them."""
        return ClassificationRecipe(self.train, self.val, self.prompts, self.head, retain)

    def validate(self, clip: Clip, features: FeatureArgs) -> dict[str, float]:
        return {} if self.val is None else self._measure(clip, self.val, features)

    def tested(self, clip: Clip, features: FeatureArgs) -> dict[str, float]:
        """Measure the prompts on the test data, with names that begin with `test_`."""
        found = {} if self.test is None else self._measure(clip, self.test, features)
        return {f"test_{name}": value for name, value in found.items()}

    def _measure(self, clip: Clip, images: Labelled, features: FeatureArgs) -> dict[str, float]:
        return evaluate_classification(clip, images, self.prompts, features).metrics


@dataclass(frozen=True)
class TranslationData:
    """Translations to train and validate on, and pairs beside them."""

    train: Translations
    val: Translations
    pairs: Pairs | None
    val_pairs: Pairs | None
    options: TranslateArgs

    task: ClassVar[TaskName] = "translation"
    unit: ClassVar[str] = "texts, translations and pairs"

    @property
    def rows(self) -> int:
        groups = (self.train.as_pairs(with_source=True), self.pairs)
        return sum(len(captions) for group in groups if group for captions in group.captions)

    def recipe(self, retain: Retained | None = None) -> Recipe:
        """What trains a model on them."""
        return TranslationRecipe(self.train, self.val, self.pairs, self.val_pairs, self.options, retain)


def translation_args(data: DataFlags, flags: TranslateFlags) -> TranslationArgs:
    """How the table of translations is read."""
    keys = {name: getattr(flags, name) for name in ("csv_source_key", "csv_target_key")}
    return part(data, TranslationArgs, **keys)


def read_translation_data(
    clip: Clip, data: DataFlags, flags: TranslateFlags, val_size: float | None, seed: int
) -> TranslationData:
    """Read translations and the pairs beside them, and print the summaries; hold out some to validate on.

    Raises:
        DataError: they cannot be used.
    """

    def read(path: Path, columns: DataFlags) -> Translations:
        found = read_translations(path, translation_args(columns, flags))
        found = tell_tokens(found, clip.count_tokens, clip.context_length)
        assert found.report is not None
        log.info("%s", found.report.summary())
        return found

    assert data.train_data is not None
    train = read(data.train_data, data)
    if data.val_data is not None:
        val = read(data.val_data, data.for_validation())
    else:
        train, val = split_translations(train, val_size, seed)
        log.info("%s texts to train on, %s held out", f"{len(train):,}", f"{len(val):,}")
    pictures, val_pictures = (
        None if path is None else read_table(clip, path, of_pairs(data), what)
        for path, what in ((flags.pairs, "pairs"), (flags.val_pairs, "validation pairs"))
    )
    return TranslationData(train, val, pictures, val_pictures, part(flags, TranslateArgs))


def of_pairs(data: DataFlags) -> DataFlags:
    """How the table of pairs beside the translations is read: what tells how those are written is theirs."""
    own = ("dataset_type", "csv_separator", "csv_encoding", "csv_quoting", "split", "sheet", "query")
    return data.model_copy(update={name: DataFlags.model_fields[name].default for name in own})


def read_training_data(
    clip: Clip, data: DataFlags, classes: ClassTrainFlags, seed: int, test: Path | None = None
) -> PairData | ClassData:
    """Read and check the data that flags name, and print the summaries.

    Raises:
        DataError: they cannot be used.
    """
    assert data.train_data is not None
    if classes.task == "classification":
        return _read_classes(data, classes, seed, test)
    pairs = read_table(clip, data.train_data, data, "training data")
    val = tested = None
    if data.val_data is not None:
        val = read_table(clip, data.val_data, data.for_validation(), "validation data")
    if test is not None:
        tested = read_table(clip, test, data.for_test(), "test data")
    return PairData(pairs, val, tested)


def read_what_to_retain(flags: RetainFlags, data: DataFlags, images: bool = False) -> Retained:
    """Read what a model is not to forget from the file or folder that is named: texts, `images` too if told.

    Raises:
        DataError: they cannot be read, or are too few.
    """
    assert flags.retain is not None
    table = part(data, TableArgs, dataset_type="auto")
    return read_retained(flags.retain, table, flags.retain_weight, images=images)


def _read_classes(data: DataFlags, classes: ClassTrainFlags, seed: int, test: Path | None) -> ClassData:
    """Read labelled images, hold out those to validate on, and keep a few shots of the others if asked to."""
    assert data.train_data is not None
    train = read_images(data.train_data, data, classes, "training images")
    val = tested = None
    if data.val_data is not None:
        held_out = read_images(data.val_data, data, classes, "validation images", validation=True)
        val = match_classes(held_out, train.classes)
    elif classes.val_size is not None:
        train, val = split_labelled(train, classes.val_size, seed)
        log.info("%d images to train on, %d held out", len(train), len(val))
    if classes.shots is not None:
        train = few_shot(train, classes.shots, seed)
        log.info("%d images to train on: %d shots a class", len(train), classes.shots)
    prompts = prompts_of(train.classes, classes)
    if test is not None:
        tested = match_classes(read_images(test, data.for_test(), classes, "test images"), train.classes)
    head = part(classes, HeadArgs)
    if classes.class_weights:
        head = head.replace(weights=tuple(class_weights(train)))
    return ClassData(train, val, tested, prompts, head)
