"""`clipgraft fewshot`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.common import base_below
from clipgraft.cli.flags.fewshot import FewShotFlags
from clipgraft.cli.flags.shared import ModelFlags, PromptFlags, TableFlags, features_of
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.data.args import LabelArgs
from clipgraft.options import Options, part
from clipgraft.progress import showing
from clipgraft.train.fewshot.args import FewShotArgs

if TYPE_CHECKING:
    from clipgraft.data.class_splits import ClassSplits
    from clipgraft.data.datasets import Labelled
    from clipgraft.train.fewshot.compare import FewShotData
    from clipgraft.train.fewshot.results import FewShotComparison

log = logging.getLogger("clipgraft")
_SUMMARY = "Adapt a base to a few images of each class in several ways, and compare them in one table."
_COOP = "coop"
_WHERE = "--train-data is missing: a folder of class folders, a table or a CoOp split; or name a --dataset"


def run_fewshot(argv: Sequence[str]) -> None:
    """Parse, read the images, run the cells that are not finished, and write table and figure."""
    kinds: list[type[Options]] = [FewShotFlags, FewShotArgs, ModelFlags, TableFlags, PromptFlags]
    spec, args, model, table, classes = parse("fewshot", _SUMMARY, kinds, argv)
    _check(spec, args, model, classes)
    from clipgraft.cli.common import load_model
    from clipgraft.models.device import use_autocast
    from clipgraft.train.fewshot.compare import check_few_shot, compare_few_shot
    from clipgraft.train.run_folder import early_lines

    data = _read(spec, args, table, classes)
    check_few_shot(data, args, spec.out)
    splits = data.splits
    images = f"{len(splits.train):,} images to draw from, {len(splits.test):,} to test on"
    log.info("%d classes: %s", len(splits.names), images)
    with early_lines():
        clip = load_model(model)
        features = features_of(table, use_autocast(model.autocast, clip.device))
        found = compare_few_shot(clip, data, args, out=spec.out, features=features)
    print()
    show(found.table())
    print()
    _tell_worse(found, args)
    log.info("wrote %s, results.json and shots-N.json", spec.out / "table.md")
    _draw(found, spec.out)


def _check(spec: FewShotFlags, args: FewShotArgs, model: ModelFlags, classes: PromptFlags) -> None:
    """Raise ConfigError with all faults that no option alone shows, before anything slow."""
    faults = [] if spec.dataset or spec.train_data else [_WHERE]
    if spec.dataset is not None:
        from clipgraft.data.published_sets import find_set

        faults += checks.fault_of(lambda: find_set(spec.dataset or ""), "--dataset")
        given = {"train_data", "test_data", "test_size", "images"} & spec.model_fields_set
        faults += [f"--{name.replace('_', '-')} given beside --dataset: drop one" for name in sorted(given)]
    elif spec.train_data is not None:
        split = _is_split(spec.train_data)
        tests = [spec.test_data, spec.test_size]
        if split and any(test is not None for test in tests):
            faults.append(f"{spec.train_data} has its own test images: drop --test-data and --test-size")
        if not split and sum(test is not None for test in tests) != 1:
            faults.append("give --test-data, or --test-size to hold out a part of --train-data")
        if not split and spec.images is not None:
            faults.append("--images belongs to a CoOp split (split_*.json): drop it")
        for name, path in (("--train-data", spec.train_data), ("--test-data", spec.test_data)):
            faults += [] if path is None else checks.missing_data(name, path)
    if classes.templates == _COOP and spec.dataset is None:
        faults.append("--templates coop are those of a --dataset: name it, or give a text with {} in it")
    faults += checks.output_faults("--out", spec.out, folder=True) + checks.device_faults(model.device)
    if base_below(model) is not None:
        faults.append(f"--model {model.model} is an adapter on its base: give the base")
    checks.refuse(faults)


def _is_split(path: Path) -> bool:
    """Tell a split in CoOp's layout by its name: other JSON files are tables."""
    return path.name.startswith("split_") and path.suffix.lower() == ".json"


def _read(spec: FewShotFlags, args: FewShotArgs, table: TableFlags, classes: PromptFlags) -> FewShotData:
    """Read and check the images, and write the prompts of their classes."""
    from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
    from clipgraft.data.published_sets import find_set, read_published, read_published_shots
    from clipgraft.train.fewshot.compare import FewShotData

    draws: dict[tuple[int, int], Labelled] = {}
    if spec.dataset is not None:
        splits = read_published(spec.dataset, spec.root, strict=table.strict)
        draws = read_published_shots(spec.dataset, spec.root, splits, args.shots, args.all_seeds)
    else:
        splits = _read_splits(spec, table, classes)
    own = classes.templates == _COOP and spec.dataset is not None
    template = find_set(spec.dataset or "").template if own else classes.templates
    given = None if classes.prompts is None else read_prompts(classes.prompts)
    prompts = class_prompts(splits.names, given, find_templates(template))
    return FewShotData(splits, prompts, draws, table.strict)


def _read_splits(spec: FewShotFlags, table: TableFlags, classes: PromptFlags) -> ClassSplits:
    from clipgraft.data.class_splits import ClassSplits, read_split
    from clipgraft.data.datasets import match_classes, split_labelled

    assert spec.train_data is not None
    if _is_split(spec.train_data):
        return read_split(spec.train_data, spec.images or spec.train_data.parent, strict=table.strict)
    train = _read_images(spec.train_data, table, classes, "images to draw from")
    if spec.test_data is not None:
        test = _read_images(spec.test_data, table, classes, "test images")
        return ClassSplits(train, match_classes(test, train.classes), train.classes)
    assert spec.test_size is not None
    train, test = split_labelled(train, spec.test_size, seed=0)
    return ClassSplits(train, test, train.classes)


def _read_images(path: Path, table: TableFlags, classes: PromptFlags, what: str) -> Labelled:
    from clipgraft.data.reader import read_labelled

    args = part(table, LabelArgs, csv_label_key=classes.csv_label_key, dataset_type="auto")
    with showing(None, f"checking {what}") as progress:
        images = read_labelled(path, args, workers=table.workers, progress=progress)
    assert images.report is not None
    log.info("%s", images.report.summary())
    return images


def _tell_worse(found: FewShotComparison, args: FewShotArgs) -> None:
    """Warn of modes that end below zero-shot."""
    from clipgraft.train.fewshot.towers import STEPS_PER_SHOT

    shots: dict[str, list[str]] = {}
    for row in found.worse:
        shots.setdefault(row.mode, []).append(str(row.shots))
    for mode, counts in shots.items():
        told = f"{mode} is below zero-shot at --shots {','.join(counts)}"
        if mode in STEPS_PER_SHOT:
            steps = args.steps_per_shot or STEPS_PER_SHOT[mode]
            fewer = f"--steps-per-shot {max(1, steps // 10)} and another --out"
            told += f": {steps} steps a shot are too many for this base; try {fewer}"
        log.warning("%s", told)


def _draw(found: FewShotComparison, out: Path) -> None:
    """Draw accuracy by shots, where the packages of reports are installed."""
    from clipgraft.errors import ConfigError
    from clipgraft.report.few_shot import few_shot_figure
    from clipgraft.report.write_report import require_packages

    try:
        require_packages()
    except ConfigError as missing:
        log.info("no figure is drawn: %s", missing)
        return
    from clipgraft.files import write_text

    write_text(out / "accuracy.svg", few_shot_figure(found))
    log.info("drew %s", out / "accuracy.svg")
