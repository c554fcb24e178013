"""Read the data of a sweep once for all cells, and train and measure a model on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from clipgraft.cli.flags.shared import features_of
from clipgraft.cli.flags.training import ClassTrainFlags
from clipgraft.cli.read_data import ClassData, read_class_data, read_images, read_table
from clipgraft.cli.train import head_of
from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled, Pairs, match_classes
from clipgraft.evaluate.classification import evaluate_classification
from clipgraft.evaluate.metrics import DECISIVE, HEADLINE, TaskName
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.fit import fit, fit_classifier
from clipgraft.train.run import FitResult

Measure: TypeAlias = Callable[[Clip], dict[str, float]]


@dataclass(frozen=True)
class Work:
    """Functions that train and measure a model.

    Attributes:
        fit: trains a model on the training data, and measures it on the validation data.
        validate: measures a model on the validation data.
        test: the same on the test data, if there are some.
    """

    fit: Callable[[Clip, TrainArgs, RunArgs], FitResult]
    validate: Measure
    test: Measure | None

    def tested(self, clip: Clip) -> dict[str, float]:
        """Measure on the test data, with names that begin with `test_`; nothing without such data."""
        return {f"test_{name}": value for name, value in self.test(clip).items()} if self.test else {}


@dataclass(frozen=True)
class Material:
    """Data and choices that all cells share; other processes get a copy.

    Attributes:
        autocast: whether to compute in bf16.
        pairs: training, validation and test data, of retrieval.
        classes: of classification, with `test`.
        shown: names of the metrics in the table; those of the test data begin with `test_`.
    """

    autocast: bool
    pairs: tuple[Pairs, Pairs, Pairs | None] | None
    classes: ClassData | None
    test: Labelled | None
    shown: tuple[str, ...]


def read_material(clip: Clip, specs: Sequence[Any]) -> Material:
    """Read and check the data of a sweep, from its model, data, class, sweep and train specs.

    Raises:
        DataError: they cannot be used.
    """
    model_spec, data, classes, sweep, train = specs
    autocast = use_autocast(model_spec.autocast, clip.device)
    if classes.task == "classification":
        read, test = read_class_data(data, classes, train.seed), None
        if sweep.test_data is not None:
            images = read_images(sweep.test_data, data, classes, "test images")
            test = match_classes(images, read.train.classes)
        return Material(autocast, None, read, test, _shown("classification", test is not None))
    tables = {
        "training data": data.train_data,
        "validation data": data.val_data,
        "test data": sweep.test_data,
    }
    read_as = {"validation data": data.for_validation()}
    found = {
        what: read_table(clip, path, read_as.get(what, data), what)
        for what, path in tables.items()
        if path is not None
    }
    pairs = (found["training data"], found["validation data"], found.get("test data"))
    return Material(autocast, pairs, None, None, _shown("retrieval", "test data" in found))


def _shown(task: TaskName, tested: bool) -> tuple[str, ...]:
    """Name the metrics of a sweep's table; of test data only the decisive ones."""
    test = tuple(f"test_{name}" for name in DECISIVE[task]) if tested else ()
    return HEADLINE[task] + test


def work_of(material: Material, specs: Sequence[Any]) -> Work:
    """Make the functions that train and measure a model on the data of a sweep."""
    _, data, classes, _, _ = specs
    features = features_of(data, material.autocast)
    if material.pairs is not None:
        return _retrieval(*material.pairs, features)
    assert material.classes is not None
    return _classification(material.classes, classes, material.test, features)


def _retrieval(train: Pairs, val: Pairs, test: Pairs | None, features: FeatureArgs) -> Work:
    def on(pairs: Pairs) -> Measure:
        return lambda model: evaluate_retrieval(model, pairs, features)

    def train_on_pairs(model: Clip, args: TrainArgs, run: RunArgs) -> FitResult:
        return fit(model, train, val, train=args, run=run, features=features)

    return Work(train_on_pairs, on(val), None if test is None else on(test))


def _classification(
    read: ClassData, classes: ClassTrainFlags, test: Labelled | None, features: FeatureArgs
) -> Work:
    val, head = read.val, head_of(classes, read.train)
    assert val is not None

    def on(images: Labelled) -> Measure:
        return lambda model: evaluate_classification(model, images, read.prompts, features).metrics

    def train_on_images(model: Clip, args: TrainArgs, run: RunArgs) -> FitResult:
        return fit_classifier(
            model,
            read.train,
            val,
            prompts=read.prompts,
            head=head,
            train=args,
            run=run,
            features=features,
        )

    return Work(train_on_images, on(val), None if test is None else on(test))
