"""`python -m benchmarks.defaults FOLDER`: a run with default settings beside the best of a search by hand.

Adapts the embedded base to captions in four languages, with 300 to 8,000 pairs. Both keep the epoch that is
best on 1,000 validation captions; both are measured on 5,000 test captions. A search by hand tries two
numbers of epochs and four learning rates, and its best is chosen by the validation data as well. One seed.

Prints a line for each run as it ends; `--part 0/2` does every second case, so that two processes share them.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg

LANGUAGES = ("vi", "tr", "fr", "id")
_CAPTIONS = 5  # of a scene
# By number of pairs: the epochs that are tried by hand.
EPOCHS = {300: (10, 30), 1_000: (5, 15), 8_000: (3, 8)}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_BY_HAND: dict[str, Any] = {"wd": 0.1, "warmup": 50}
MATRICES = "linear-text,text.token_embedding,text.proj"


@dataclass(frozen=True)
class Case:
    """Captions of a language, of which so many are trained on."""

    language: str
    pairs: int


@dataclass(frozen=True)
class Outcome:
    """R@1, the mean of both directions in percent, on validation and test data."""

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
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--pairs", default=",".join(map(str, EPOCHS)))
    parser.add_argument("--base", default="emoji")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
    number, of = map(int, args.part.split("/"))
    cases = [Case(*both) for both in product(args.languages.split(","), map(int, args.pairs.split(",")))]
    print("| language | pairs | settings | epochs | kept | learning rate | val | test | seconds |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in cases[number::of]:
        for name, train in settings(case, args.default_only):
            found = run(case, train, args.folder, args.base)
            how = f"{train.epochs} | {found.epoch} | {found.lr:g}"
            what = f"{found.val:.1f} | {found.test:.1f} | {found.seconds:.0f}"
            print(f"| {case.language} | {case.pairs:,} | {name} | {how} | {what} |", flush=True)


def settings(case: Case, default_only: bool) -> Iterator[tuple[str, cg.TrainArgs]]:
    """List the settings of a case: the default, and those that are tried by hand."""
    yield "default", cg.TrainArgs()
    if default_only:
        return
    for epochs, lr in product(EPOCHS[case.pairs], RATES):
        yield "by hand", cg.TrainArgs(epochs=epochs, lr=lr, **_BY_HAND)


def run(case: Case, train: cg.TrainArgs, folder: Path, base: str) -> Outcome:
    """Train a case with some settings, and measure the epoch that it keeps."""
    scenes = case.pairs // _CAPTIONS
    pairs, val, test = (
        emoji_pairs(folder, split, size, case.language)
        for split, size in (("train", scenes), ("val", 200), ("test", 1_000))
    )
    clip = cg.load(base)
    torch.manual_seed(0)
    cg.apply_lora(clip, r=16, targets=MATRICES)
    features = cg.FeatureArgs(feature_cache=folder / "features", autocast=True)
    out = folder / "runs" / f"{case.language}-{case.pairs}-{time.time_ns()}"
    started = time.perf_counter()
    result = cg.fit(
        *(clip, pairs, val),
        train=train,
        run=cg.RunArgs(out=out, save_frequency=0, progress=False, strength="none"),
        features=features,
    )
    seconds = time.perf_counter() - started
    found = cg.evaluate_retrieval(clip, test, features, progress=False)
    shutil.rmtree(out)
    lr = result.rate.lr if result.rate is not None else train.peak_lr
    return Outcome(_recall(result.metrics), _recall(found), result.best_epoch, seconds, lr)


def emoji_pairs(folder: Path, split: str, size: int, language: str) -> cg.Pairs:
    """Scenes of a split with captions in a language, written into the folder once."""
    place = folder / f"{split}-{size}"
    table = place / f"{split}.{language}.csv"
    if not table.is_file():
        cg.emoji.write_scenes(place, split, size, [language])
    return cg.read_pairs(table, verify="header", progress=False)


def _recall(metrics: Any) -> float:
    return 50 * float(metrics["image_to_text_R@1"] + metrics["text_to_image_R@1"])


if __name__ == "__main__":
    main(sys.argv[1:])
