"""Run few-shot modes by number of images a class and seed; what is finished is not run again."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.augmentation import crop_and_flip
from clipgraft.data.class_splits import ClassSplits, class_range
from clipgraft.data.datasets import Labelled, few_shot
from clipgraft.errors import AdapterError, ConfigError, DataError
from clipgraft.evaluate.classification import class_features, classification_metrics
from clipgraft.locks import LOCK, sole_owner
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.options import part
from clipgraft.train.cells import read_finished, write_finished
from clipgraft.train.fewshot.args import FeatureModeArgs, FewShotArgs
from clipgraft.train.fewshot.features import (
    Classifier,
    FewShotFeatures,
    LinearClassifier,
    Projection,
    few_shot_features,
    projection_of,
    tower_features,
)
from clipgraft.train.fewshot.modes import FEATURE_MODES
from clipgraft.train.fewshot.results import (
    CELLS,
    METRICS,
    ZERO_SHOT,
    FewShotCell,
    FewShotCellResult,
    FewShotComparison,
    FewShotRecord,
    harmonic_mean,
)
from clipgraft.train.fewshot.towers import (
    STEPS_PER_SHOT,
    Job,
    OnClasses,
    Prompts,
    tuned_by_clip_lora,
    tuned_by_two_stages,
)
from clipgraft.train.loop import Interrupted
from clipgraft.train.recipes.classification import digest_of

log = logging.getLogger("clipgraft")
_TOWER_MODES = {"clip-lora": tuned_by_clip_lora, "2sfs": tuned_by_two_stages}


@dataclass(frozen=True)
class FewShotData:
    """What modes are trained and measured on.

    Attributes:
        splits: images to draw from, and to test on.
        prompts: one or more of each class.
        draws: images of single draws that somebody shares, by (shots, seed); others are drawn.
        strict: refuse classes with fewer images than shots, test images that are trained on, and a class that
            is base and novel.
    """

    splits: ClassSplits
    prompts: Prompts
    draws: Mapping[tuple[int, int], Labelled] = field(default_factory=dict)
    strict: bool = False


def compare_few_shot(
    model: ClipLike,
    data: FewShotData,
    args: FewShotArgs | None = None,
    *,
    out: Path,
    features: FeatureArgs | None = None,
) -> FewShotComparison:
    """Train each mode on each number of images a class with each seed, and measure it on the test images.

    Cells that `out` has finished with the same settings are read, one that was interrupted goes on.

    Args:
        model: a base without adapter, which is the same to the bit afterwards.
        data: images, classes and prompts.
        args: modes, shots and seeds.
        out: folder of the comparison: `cells/`, `table.md`, `results.json`, `shots-N.json`.
        features: how images become features, and where those of the untuned image tower are kept.

    Raises:
        AdapterError: the model carries an adapter.
        BusyError: another process is at work in `out`.
        CheckpointError: a cell there was run with other settings, or its record is damaged.
        ConfigError, DataError: as `check_few_shot`; the preprocessing is none that can be cropped by; an
            image that cannot be used.
        TrainingError, Interrupted: as `fit_classifier`.
    """
    clip, args = as_clip(model), args or FewShotArgs()
    if lora_state(clip) is not None:
        raise AdapterError("the model carries an adapter: few-shot modes start from a base; remove it")
    check_few_shot(data, args, out)
    for doubt, meaning in _doubts(data, args):
        log.warning("%s: %s", doubt, meaning)
    with sole_owner(out / LOCK, f"comparison {out}", "wait until it ends, or choose another `out`"):
        found = _Comparison(clip, data, args, out, features or FeatureArgs()).run()
        found.write(out)
    return found


def check_few_shot(data: FewShotData, args: FewShotArgs, out: Path) -> None:
    """Find what `compare_few_shot` would refuse, without a model.

    Raises:
        ConfigError: `out` holds something else, or the setting needs more classes.
        DataError: prompts or test images of some classes are missing; or `strict`, and a class has too few
            images, is base and novel, or a test image is among those to draw from.
    """
    _refuse_other(out)
    classes = next(iter(_tested(data, args).values())).images.classes
    if not data.strict:
        return
    for doubt, _ in _doubts(data, args):
        raise DataError(f"{doubt}: mend that, or drop `strict`")
    train = class_range(data.splits.train, 0, len(classes))
    for shots in args.shots:
        drawn = [seed for seed in args.all_seeds if (shots, seed) not in data.draws]
        short = [name for name, count in zip(train.classes, train.counts(), strict=True) if count < shots]
        if short and drawn:
            raise DataError(
                f"{len(short)} of {len(classes)} classes have fewer than {shots} training images, such as "
                f"{short[0]}: ask for fewer `shots`, add images, or drop `strict`"
            )


def _refuse_other(out: Path) -> None:
    if out.is_dir() and not (out / CELLS).is_dir():
        others = sorted(item.name for item in out.iterdir() if item.name != LOCK)
        if others:
            raise ConfigError(
                f"`out={out}` holds what no comparison made ({others[0]}): choose another, or an empty folder"
            )


def _doubts(data: FewShotData, args: FewShotArgs) -> list[tuple[str, str]]:
    """What makes the numbers better than they are, and how."""
    found = []
    known = {image.resolve() for image in data.splits.train.images}
    both = [image for image in data.splits.test.images if image.resolve() in known]
    if both:
        told = f"{len(both):,} of {len(data.splits.test):,} test images are among those to draw from"
        found.append((f"{told}, such as {both[0]}", "the accuracy is in part of what was trained on"))
    if args.setting == "base-to-novel":
        base, novel = data.splits.halves()
        shared = sorted({*base.names} & {*novel.names})
        if shared:
            many = "1 name is that" if len(shared) == 1 else f"{len(shared)} names are those"
            told = f"{many} of a base class and of a novel one, such as {shared[0]}"
            found.append((told, "the accuracy on novel classes is in part of what was trained on"))
    return found


class _Comparison:
    """One comparison: the classes trained on, those tested on, and what is computed once for all cells."""

    def __init__(
        self, clip: Clip, data: FewShotData, args: FewShotArgs, out: Path, features: FeatureArgs
    ) -> None:
        self.clip, self.data, self.args, self.out, self.features = clip, data, args, out, features
        self.tested = _tested(data, args)
        trained = next(iter(self.tested.values()))
        self.prompts = trained.prompts
        self.classes = len(trained.images.classes)
        self._rows: dict[str, Tensor] = {}
        self._texts: dict[str, Tensor] = {}
        self._seen: tuple[tuple[int, int], FewShotFeatures, float] | None = None

    def run(self) -> FewShotComparison:
        """Read or run every cell."""
        args = self.args
        cells = [FewShotCell(ZERO_SHOT)] + [
            FewShotCell(mode, shots, seed)
            for shots in args.shots
            for seed in args.all_seeds
            for mode in args.modes
        ]
        results = []
        draws: dict[tuple[int, int], Labelled] = {}
        for number, cell in enumerate(cells, start=1):
            key = cell.shots, cell.seed
            if cell.shots and key not in draws:
                draws = {key: self._draw(*key)}
            results.append(self._cell(cell, draws.get(key), f"cell {number} of {len(cells)}: {cell.name}"))
        return FewShotComparison(args.setting, tuple(results))

    def _draw(self, shots: int, seed: int) -> Labelled:
        shared = self.data.draws.get((shots, seed))
        if shared is not None:
            log.info("%d shots, seed %d: %d images of a published draw", shots, seed, len(shared))
            return class_range(shared, 0, self.classes)
        train = class_range(self.data.splits.train, 0, self.classes)
        return few_shot(train, shots, seed)

    def _cell(self, cell: FewShotCell, few: Labelled | None, told: str) -> FewShotCellResult:
        place, settings = self.out / CELLS / cell.name, self._settings(cell, few)
        record = read_finished(place, FewShotRecord, settings, "a new `out`")
        if record is not None:
            log.info("%s is finished already", told)
            return record.result
        log.info("%s", told)
        if few is None:
            result = FewShotCellResult(cell, self._measure_rows(self._zero_shot_classifier()))
        elif cell.mode in _TOWER_MODES:
            result = self._train_towers(cell, few, place)
        else:
            result = self._train_on_features(cell, few)
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.metrics.items())
        log.info("%s: %s", cell.name, shown)
        write_finished(place, result, settings)
        return result

    def _settings(self, cell: FewShotCell, few: Labelled | None) -> dict[str, Any]:
        """What a finished cell must have been run with."""
        tests = [digest_of(test.images, test.prompts) for test in self.tested.values()]
        shared = {"base": self.clip.fingerprint, "setting": self.args.setting, "test images": tests}
        if few is None:
            return shared
        shared["training images"] = digest_of(few, self.prompts)
        if cell.mode in _TOWER_MODES:
            return {**shared, "steps": self._steps(cell)}
        return {**shared, "views": self.args.views, **part(self.args, FeatureModeArgs).model_dump()}

    def _steps(self, cell: FewShotCell) -> int:
        return cell.shots * (self.args.steps_per_shot or STEPS_PER_SHOT[cell.mode])

    def _train_towers(self, cell: FewShotCell, few: Labelled, place: Path) -> FewShotCellResult:
        job = Job(few, self.prompts, self._steps(cell), cell.seed, place, self.features)
        try:
            with _TOWER_MODES[cell.mode](self.clip, job) as tuned:
                shares = {name: tuned.accuracy(test) for name, test in self.tested.items()}
                return FewShotCellResult(
                    cell, _with_harmonic_mean(shares), len(few), tuned.weights, tuned.seconds
                )
        except Interrupted as stop:
            told = Interrupted(f"cell {cell.name}: {stop}; run the same again to go on")
            told.signal = stop.signal
            raise told from None

    def _train_on_features(self, cell: FewShotCell, few: Labelled) -> FewShotCellResult:
        features, encoding = self._features_of(cell, few)
        started = time.perf_counter()
        made = FEATURE_MODES[cell.mode].fit(features, part(self.args, FeatureModeArgs), cell.seed)
        seconds = encoding + time.perf_counter() - started
        return FewShotCellResult(cell, self._measure_rows(made), len(few), made.trained_weights, seconds)

    def _features_of(self, cell: FewShotCell, few: Labelled) -> tuple[FewShotFeatures, float]:
        """Features of the training images, and the seconds they took: the modes of one draw share them."""
        key = cell.shots, cell.seed
        if self._seen is None or self._seen[0] != key:
            clip, started = self.clip, time.perf_counter()
            if self.args.views > 1:
                clip = replace(clip, preprocess_train=crop_and_flip(clip.require_preprocess()))
            texts = self._class_texts(next(iter(self.tested)))
            with _quiet():  # lines on every view
                found = few_shot_features(
                    clip, few, texts, self.features, views=self.args.views, seed=cell.seed
                )
            self._seen = key, found, time.perf_counter() - started
        return self._seen[1], self._seen[2]

    def _class_texts(self, name: str) -> Tensor:
        if name not in self._texts:
            self._texts[name] = class_features(self.clip, self.tested[name].prompts)
        return self._texts[name]

    def _test_rows(self, name: str) -> Tensor:
        if name not in self._rows:
            self._rows[name] = tower_features(self.clip, self.tested[name].images.images, self.features)
        return self._rows[name]

    def _zero_shot_classifier(self) -> Classifier:
        return self._by_texts(projection_of(self.clip), next(iter(self.tested)))

    def _by_texts(self, projection: Projection, name: str) -> LinearClassifier:
        scale = float(self.clip.logit_scale.detach().float().exp())
        return LinearClassifier(projection, self._class_texts(name), scale)

    def _measure_rows(self, made: Classifier) -> dict[str, float]:
        """Accuracy of a classifier on features; what it learnt of the projection holds for other classes."""
        shares = {}
        for name, test in self.tested.items():
            classifier = made
            if not test.trained:
                own = made.projection if isinstance(made, LinearClassifier) else projection_of(self.clip)
                classifier = self._by_texts(own, name)
            logits = classifier.logits(self._test_rows(name))
            labels = torch.tensor(test.images.labels)
            shares[name] = classification_metrics(logits, labels, test.images.classes).metrics["acc1"]
        return _with_harmonic_mean(shares)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _tested(data: FewShotData, args: FewShotArgs) -> dict[str, OnClasses]:
    """What is tested on, by the names of the metrics; the first are the classes that are trained on."""
    names, prompts = METRICS[args.setting], data.prompts
    if len(prompts) != len(data.splits.names):
        raise DataError(
            f"prompts of {len(prompts)} classes for {len(data.splits.names)} classes; give all theirs"
        )
    if args.setting == "all":
        return {names[0]: OnClasses(data.splits.test, prompts)}
    if len(data.splits.names) < 4:
        raise ConfigError("`setting=base-to-novel` needs four classes or more: two to train on, two others")
    base, novel = data.splits.halves()
    for half, what in ((base, "base"), (novel, "novel")):
        if not len(half.test):
            raise DataError(f"no test image of a {what} class: add some, or use `setting=all`")
    middle = len(base.names)
    return {
        names[0]: OnClasses(base.test, prompts[:middle]),
        names[1]: OnClasses(novel.test, prompts[middle:], trained=False),
    }


def _with_harmonic_mean(shares: Mapping[str, float]) -> dict[str, float]:
    values: Sequence[float] = list(shares.values())
    if len(values) == 1:
        return dict(shares)
    return {**shares, METRICS["base-to-novel"][2]: harmonic_mean(*values)}
