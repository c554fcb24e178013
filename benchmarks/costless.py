"""`python -m benchmarks.costless FOLDER`: what is gained without training a tower, or without another run.

The embedded base and the 25 classes of its objects, whose prompts name the objects; 1,500 pictures in the
styles that it trains on and 1,500 in another style. *Feature modes*: 1, 4 and 16 images a class, three draws.
*Prompt weights*: learnt on 1,200 pictures. *Averages*: adapters of rank 4 on every matrix, three seeds, over
1,200 pictures in three epochs and over 100 in thirty; the mean of the three beside their average, whole and
cut to rank 4.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_images
from clipgraft.data.prompts import class_prompts, find_templates
from clipgraft.emoji.classes import emoji_prompts
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.classification import class_features, evaluate_classification
from clipgraft.train.fewshot.args import FeatureModeArgs
from clipgraft.train.fewshot.features import (
    few_shot_features,
    tower_features,
    zero_shot,
)
from clipgraft.train.fewshot.modes import FEATURE_MODES
from clipgraft.train.fewshot.prompt_weights import learn_prompt_weights

_SIZES = {"train": 48, "val": 60, "test": 60}
_SEEDS = (0, 1, 2)
_RANK = 4
_RUNS = ((48, 3), (4, 30))  # pictures of each class, epochs
_LR = 1e-3


@dataclass(frozen=True)
class World:
    """The base, its data, and where features are kept."""

    clip: cg.Clip
    splits: Mapping[str, Labelled]
    prompts: Sequence[Sequence[str]]
    features: cg.FeatureArgs

    @classmethod
    def at(cls, folder: Path) -> World:
        """Draw the pictures into a folder, as far as they are not there."""
        splits = {
            split: cg.data.read_labelled(
                cg.emoji.write_classes(folder / "classes", split, size), progress=False
            )
            for split, size in _SIZES.items()
        }
        of_class = emoji_prompts()
        prompts = [of_class[name] for name in splits["train"].classes]
        return cls(cg.load("emoji"), splits, prompts, cg.FeatureArgs(feature_cache=folder / "features"))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costless", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("modes", "prompts", "averages"), help="one of the tables")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
    world = World.at(args.folder)
    parts: dict[str, Callable[[], None]] = {
        "modes": lambda: feature_modes(world),
        "prompts": lambda: weigh_prompts(world),
        "averages": lambda: averages(world, args.folder / "runs"),
    }
    for name, make in parts.items():
        if args.only in (None, name):
            make()


def feature_modes(world: World) -> None:
    """Top-1 accuracy in percent of each mode, in the styles trained on and in another one."""
    texts = class_features(world.clip, world.prompts)
    seen = {split: tower_features(world.clip, world.splits[split].images, world.features) for split in _SIZES}
    labels = {split: torch.tensor(data.labels) for split, data in world.splits.items()}

    def accuracies(logits: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        one, other = (
            100 * (logits(seen[split]).argmax(1) == labels[split]).double().mean().item()
            for split in ("val", "test")
        )
        return one, other

    print("| shots | mode | trained weights | same styles | another style | seconds |")
    print("|---:|---|---:|---:|---:|---:|")
    for shots in (1, 4, 16):
        draws = [
            few_shot_features(
                world.clip, cg.data.few_shot(world.splits["train"], shots, seed), texts, world.features
            )
            for seed in _SEEDS
        ]
        start = accuracies(zero_shot(draws[0]).logits)
        print(f"| {shots} | zero-shot | 0 | {start[0]:.1f} | {start[1]:.1f} | |")
        for name, mode in FEATURE_MODES.items():
            began = time.perf_counter()
            made = [mode.fit(draw, FeatureModeArgs(), seed) for draw, seed in zip(draws, _SEEDS, strict=True)]
            seconds = (time.perf_counter() - began) / len(made)
            found = zip(*(accuracies(one.logits) for one in made), strict=True)
            cells = " | ".join(f"{fmean(values):.1f} ± {stdev(values):.1f}" for values in found)
            print(f"| {shots} | {name} | {made[0].trained_weights:,} | {cells} | {seconds:.2f} |", flush=True)


def weigh_prompts(world: World) -> None:
    """Accuracy and loss of the plain mean and of learnt weights, on training data and on others."""
    train, encoder = world.splits["train"], Encoder(world.clip)
    images = encode_images(world.clip, train.images, world.features, encoder=encoder)
    templates = class_prompts(train.classes, None, find_templates("ensemble"))
    print("\n| prompts | images | acc1, plain mean | acc1, learnt | loss, plain mean | loss, learnt |")
    print("|---|---|---:|---:|---:|---:|")
    for name, prompts in (("one of each object", world.prompts), ("the seven templates", templates)):
        made = learn_prompt_weights(encoder, train, prompts, images, shared=prompts is templates)
        for split, data in world.splits.items():
            plain, learnt = (
                evaluate_classification(world.clip, data, these, world.features).metrics
                for these in (prompts, made.prompts)
            )
            accuracy = f"{100 * plain['acc1']:.1f} | {100 * learnt['acc1']:.1f}"
            print(
                f"| {name} | {split} | {accuracy} | {plain['loss']:.2f} | {learnt['loss']:.2f} |", flush=True
            )


def averages(world: World, folder: Path) -> None:
    """Both sets of runs, of many pictures and of few."""
    for shots, epochs in _RUNS:
        average_of_seeds(world, folder, shots, epochs)


def average_of_seeds(world: World, folder: Path, shots: int, epochs: int) -> None:
    """Metrics of three seeds' adapters, of their mean, and of their average, whole and cut."""
    few = cg.data.few_shot(world.splits["train"], shots, 0)
    names = [f"{shots}-{seed}" for seed in _SEEDS]
    for seed, name in zip(_SEEDS, names, strict=True):
        clip = cg.load("emoji")
        cg.apply_lora(clip, r=_RANK, alpha=_RANK, targets="linear")
        result = cg.fit_classifier(
            clip,
            few,
            prompts=world.prompts,
            train=cg.TrainArgs(epochs=epochs, batch_size=32, lr=_LR, seed=seed),
            run=cg.RunArgs(out=folder / name, strength="none", track=(), progress=False),
        )
        cg.load_adapter(world.clip, result.saved, name=name, activate=False)
    thirds = dict.fromkeys(names, 1 / len(names))
    whole = cg.combine_adapters(world.clip, thirds, f"{shots}-whole", activate=False)
    small = cg.combine_adapters(world.clip, thirds, f"{shots}-small", rank=_RANK, activate=False)
    ranks = max(whole.ranks.values()), max(small.ranks.values())
    kept = 100 * (1 - small.error**2)
    print(f"\n{len(few):,} pictures, {epochs} epochs; rank {ranks[1]} keeps {kept:.1f} % of the energy.")
    columns = f"mean of the seeds | average, rank {ranks[0]} | average, rank {ranks[1]} |"
    print(f"\n| images | metric | base | {columns}")
    print("|---|---|---:|---:|---:|---:|")
    for split in ("val", "test"):
        found: dict[str | None, Mapping[str, float]] = {}
        for adapter in (None, *names, whole.name, small.name):
            cg.set_adapter(world.clip, adapter)
            found[adapter] = evaluate_classification(
                world.clip, world.splits[split], world.prompts, world.features
            ).metrics
        for metric, factor in (("acc1", 100), ("loss", 1)):
            ones: list[Any] = [factor * found[name][metric] for name in names]
            cells = [f"{factor * found[name][metric]:.2f}" for name in (None, whole.name, small.name)]
            mean = f"{fmean(ones):.2f} ± {stdev(ones):.2f}"
            print(f"| {split} | {metric} | {cells[0]} | {mean} | {cells[1]} | {cells[2]} |", flush=True)
    cg.set_adapter(world.clip, None)


if __name__ == "__main__":
    main()
