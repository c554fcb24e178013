"""`python -m benchmarks.amounts [FOLDER]`: recall after 1,000 to 10,000 pairs at several learning rates.

Adapts the embedded default to Vietnamese captions and prints a table. One seed; ten minutes on a core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg

ATTENTION = "text-attention"
MATRICES = "linear-text,text.token_embedding,text.proj"
FULL = "the whole text tower"
_TESTS = 1000
# Training scenes of five captions each, epochs, batch size, learning rates of LoRA and of full fine-tuning.
_GRID: tuple[tuple[int, int, int, tuple[float, ...], tuple[float, ...]], ...] = (
    (200, 5, 64, (2e-4, 5e-4, 1e-3, 3e-3), (2e-4,)),
    (600, 3, 128, (1e-3,), (2e-4,)),
    (2000, 3, 128, (5e-4, 1e-3, 3e-3), (1e-3,)),
)


def main(argv: Sequence[str]) -> None:
    """Make the data, train every cell, and print each row when it is known."""
    folder = Path(argv[0] if argv else "amounts")
    cache = cg.data.FeatureCache(folder / "features")
    tests = cg.emoji.write_scenes(folder / "data", "test", _TESTS, ["vi", "en"])
    pairs = {language: cg.read_pairs(table) for language, table in tests.items()}
    print("| pairs | trained | learning rate | steps | I→T R@1 | T→I R@1 | English T→I R@1 |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    print(f"| 0 | nothing | | | {_numbers(cg.load('emoji'), pairs, cache)} |", flush=True)
    for scenes, targets, lr, options in cells():
        table = cg.emoji.write_scenes(folder / "data", "train", scenes, ["vi"])["vi"]
        train = cg.read_pairs(table)
        clip = cg.load("emoji")
        torch.manual_seed(0)
        if targets != FULL:
            cg.apply_lora(clip, r=16, alpha=32, targets=targets)
        out = folder / "runs" / f"{scenes}-{time.time_ns()}"
        cg.fit(
            clip,
            train,
            train=cg.TrainArgs(lr=lr, wd=0.1, warmup=20, **options),
            run=cg.RunArgs(out=out, val_frequency=0, save_frequency=0, progress=False),
            features=cg.FeatureArgs(feature_cache=folder / "features", autocast=None),
        )
        steps = options["epochs"] * (5 * scenes // options["batch_size"])
        head = f"| {5 * scenes:,} | {targets} | {lr:g} | {steps} |"
        print(f"{head} {_numbers(clip, pairs, cache)} |", flush=True)


def cells() -> Iterator[tuple[int, str, float, dict[str, Any]]]:
    """List the cells: training scenes, what trains, learning rate, other options."""
    for scenes, epochs, batch_size, rates, full_rates in _GRID:
        options = {"epochs": epochs, "batch_size": batch_size}
        for targets in (ATTENTION, MATRICES):
            yield from ((scenes, targets, lr, options) for lr in rates)
        yield from ((scenes, FULL, lr, {**options, "lock_image": True}) for lr in full_rates)


def _numbers(clip: cg.Clip, tests: Mapping[str, cg.Pairs], cache: cg.data.FeatureCache) -> str:
    """Format recalls in percent as cells of the table."""
    found = {name: cg.evaluate_retrieval(clip, pairs, cache=cache) for name, pairs in tests.items()}
    both, english = found["vi"], found["en"]["text_to_image_R@1"]
    shares = (both["image_to_text_R@1"], both["text_to_image_R@1"], english)
    return " | ".join(f"{100 * share:.1f}" for share in shares)


if __name__ == "__main__":
    main(sys.argv[1:])
