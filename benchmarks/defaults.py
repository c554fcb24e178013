"""`python -m benchmarks.defaults FOLDER`: a run with default settings beside the best of a search by hand.

Adapts the embedded base to captions in four languages, and to a set of 25 classes, with 300 to 8,000 pictures
or captions. Both keep the epoch that is best on 1,000 validation captions (500 pictures); both are measured
on 5,000 test captions (2,500 pictures, in another style of art). The default is held to the base on English
texts, as `clipgraft train` does where it is not told otherwise; a search by hand is not, tries two numbers of
epochs and four learning rates, and its best is chosen by the validation data as well. One seed.

Prints a line for each run as it ends; `--part 0/2` does every second case, so that two processes share them.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from clipgraft.emoji.classes import emoji_prompts

CLASSES = "classes"
SUBJECTS = ("vi", "tr", "fr", "id", CLASSES)
_CAPTIONS = 5  # of a scene
_DEFAULT = "default"
# By number of pairs: the epochs that are tried by hand.
EPOCHS = {300: (10, 30), 1_000: (5, 15), 8_000: (3, 8)}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_BY_HAND: dict[str, Any] = {"wd": 0.1, "warmup": 50}
Measure = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """Captions of a language, or pictures with classes, of which so many are trained on."""

    subject: str
    pairs: int


@dataclass(frozen=True)
class Outcome:
    """R@1, the mean of both directions, or accuracy, in percent, on validation and test data."""

    val: float
    test: float
    epoch: int | None
    seconds: float
    lr: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cases, or a part of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case, beginning with the I-th")
    parser.add_argument("--default-only", action="store_true", help="no search by hand")
    parser.add_argument("--by-hand-only", action="store_true", help="the search by hand alone")
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--pairs", default=",".join(map(str, EPOCHS)))
    parser.add_argument("--base", default="emoji")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
    number, of = map(int, args.part.split("/"))
    cases = [Case(*both) for both in product(args.subjects.split(","), map(int, args.pairs.split(",")))]
    print("| subject | pairs | settings | epochs | kept | learning rate | val | test | seconds |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in cases[number::of]:
        for name, train in settings(case, args.default_only, args.by_hand_only):
            found = run(case, name, train, args.folder, args.base)
            how = f"{train.epochs} | {found.epoch} | {found.lr:g}"
            what = f"{found.val:.1f} | {found.test:.1f} | {found.seconds:.0f}"
            print(f"| {case.subject} | {case.pairs:,} | {name} | {how} | {what} |", flush=True)


def settings(case: Case, default_only: bool, by_hand_only: bool) -> Iterator[tuple[str, cg.TrainArgs]]:
    """List the settings of a case: the default, and those that are tried by hand."""
    if not by_hand_only:
        yield _DEFAULT, cg.TrainArgs()
    if default_only:
        return
    for epochs, lr in product(EPOCHS[case.pairs], RATES):
        yield "by hand", cg.TrainArgs(epochs=epochs, lr=lr, **_BY_HAND)


def run(case: Case, name: str, train: cg.TrainArgs, folder: Path, base: str) -> Outcome:
    """Train a case with some settings, and measure the epoch that it keeps."""
    clip = cg.load(base)
    torch.manual_seed(0)
    cg.apply_lora(clip, r=16, targets="text-matrices")
    features = cg.FeatureArgs(feature_cache=folder / "features", autocast=True)
    out = folder / "runs" / f"{case.subject}-{case.pairs}-{time.time_ns()}"
    options: dict[str, Any] = {
        "train": train,
        "run": cg.RunArgs(out=out, save_frequency=0, progress=False, strength="none"),
        "features": features,
        "retain": cg.data.retained_texts(clip) if name == _DEFAULT else None,
    }
    started = time.perf_counter()
    learn = _classes if case.subject == CLASSES else _captions
    result, test = learn(clip, case, folder, options)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    lr = result.rate.lr if result.rate is not None else train.peak_lr
    return Outcome(_measure(result.metrics), test(), result.best_epoch, seconds, lr)


def _captions(clip: cg.Clip, case: Case, folder: Path, options: dict[str, Any]) -> tuple[Any, Measure]:
    sizes = {"train": case.pairs // _CAPTIONS, "val": 200, "test": 1_000}
    pairs, val, test = (emoji_pairs(folder, split, size, case.subject) for split, size in sizes.items())
    features = options["features"]
    result = cg.fit(clip, pairs, val, **options)
    return result, lambda: _measure(cg.evaluate_retrieval(clip, test, features, progress=False))


def _classes(clip: cg.Clip, case: Case, folder: Path, options: dict[str, Any]) -> tuple[Any, Measure]:
    of_class = emoji_prompts()
    sizes = {"train": case.pairs // len(of_class), "val": 20, "test": 100}
    train, val, test = (
        cg.data.read_labelled(cg.emoji.write_classes(folder / f"classes-{size}", split, size), progress=False)
        for split, size in sizes.items()
    )
    prompts = tuple(of_class[name] for name in train.classes)
    features = options["features"]
    result = cg.fit_classifier(clip, train, val, prompts=prompts, **options)

    def measure() -> float:
        found = cg.evaluate_classification(clip, test, prompts, features, progress=False)
        return _measure(found.metrics)

    return result, measure


def emoji_pairs(folder: Path, split: str, size: int, language: str) -> cg.Pairs:
    """Scenes of a split with captions in a language, written into the folder once."""
    place = folder / f"{split}-{size}"
    table = place / f"{split}.{language}.csv"
    if not table.is_file():
        cg.emoji.write_scenes(place, split, size, [language])
    return cg.read_pairs(table, verify="header", progress=False)


def _measure(metrics: Any) -> float:
    if "acc1" in metrics:
        return 100 * float(metrics["acc1"])
    return 50 * float(metrics["image_to_text_R@1"] + metrics["text_to_image_R@1"])


if __name__ == "__main__":
    main(sys.argv[1:])
