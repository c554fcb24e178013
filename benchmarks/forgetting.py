"""`python -m benchmarks.forgetting FOLDER`: what is gained and what is forgotten, with and without `retain`.

*Text tower*: the embedded base learns Vietnamese captions (40,000, three epochs, batches of 128), by an
adapter of rank 16 on every matrix and by full fine-tuning; old is English, on the same 1,000 test scenes.
What is retained is `retained_texts`, English captions of scenes that are in no other set; no pictures with
them.

*Image tower*: it learns to tell the three styles of the art apart, of which no caption speaks, from 1,500
scenes; old are the classes of objects, by their prompts, and English captions. Retained are the same texts,
which hold the training images, or a thousand other scenes, whose pictures are held as well.

Three seeds. Prints a line for each run, then its curve of strengths. `--part 0/2` does every second run.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from benchmarks.defaults import emoji_pairs
from clipgraft.emoji.art import load_art
from clipgraft.emoji.classes import emoji_prompts

MATRICES = "text-matrices"
_SCENES, _STYLED, _OF_CLASS = 8_000, 1_500, 20
_OTHERS, _OTHER_SEED = 1_000, 1_000_003  # scenes whose pictures are retained, and which no other set has
_LORA_LR, _FULL_LR = 3e-3, 1e-3


@dataclass(frozen=True)
class Try:
    """One way to train: which tower, full or by an adapter, what is retained, and options that differ."""

    name: str
    tower: str = "text"
    full: bool = False
    retain: bool = False
    pictures: bool = False
    lora: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


TRIES = (
    Try("LoRA r=16"),
    Try("LoRA r=16, retained", retain=True),
    Try("full fine-tuning", full=True),
    Try("full fine-tuning, retained", full=True, retain=True),
    Try("image tower: LoRA r=16", "vision"),
    Try("image tower: LoRA r=16, retained", "vision", retain=True),
    Try("image tower: LoRA r=16, retained with pictures", "vision", retain=True, pictures=True),
    Try("image tower: full", "vision", full=True),
    Try("image tower: full, retained", "vision", full=True, retain=True),
)
IDEAS = (
    Try("retained, as above", retain=True),
    Try("retained, alpha 32", retain=True, lora={"alpha": 32}),
    Try("retained, lr 5e-3", retain=True, train={"lr": 5e-3}),
    Try("retained, batches of 64", retain=True, train={"batch_size": 64}),
    Try("full, batches of 64", full=True, train={"batch_size": 64}),
    Try("retained, rsLoRA", retain=True, lora={"use_rslora": True}, train={"lr": 1e-3}),
    Try("retained, LoRA+ 4", retain=True, train={"lora_plus_ratio": 4.0, "lr": 1.5e-3}),
    Try("retained, PiSSA", retain=True, lora={"init": "pissa"}, train={"lr": 1e-3}),
    Try("retained, EVA", retain=True, lora={"init": "eva"}),
    Try("retained, DoRA", retain=True, lora={"use_dora": True}),
    Try("retained, attention and MLP alone", retain=True, lora={"targets": "linear-text"}),
    Try(
        "retained, MLP alone", retain=True, lora={"targets": "text.*.fc1,fc2,text.token_embedding,text.proj"}
    ),
    Try("retained, temperature trained", retain=True, lora={"train_logit_scale": True}),
    Try("retained, negatives of the batch", retain=True, train={"negatives": "batch"}),
    Try("retained, rank 32", retain=True, lora={"r": 32, "alpha": 32}),
    Try("retained, rank 64", retain=True, lora={"r": 64, "alpha": 64}),
    Try("retained, 3 epochs", retain=True, train={"epochs": 3}),
    Try("full", full=True),
    Try("full, 3 epochs", full=True, train={"epochs": 3}),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all tries with all seeds, or a part of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run, beginning with the I-th")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--ideas", action="store_true", help="try what the literature proposes, in place of the above"
    )
    parser.add_argument("--only", default="", help="runs of these names, with semicolons between")
    parser.add_argument("--epochs", type=int, default=3, help="of the text tower")
    parser.add_argument(
        "--scenes", type=int, default=_SCENES, help="that the text tower learns, five captions each"
    )
    parser.add_argument("--base", default="emoji")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
    number, of = map(int, args.part.split("/"))
    tries = [
        one for one in (IDEAS if args.ideas else TRIES) if not args.only or one.name in args.only.split(";")
    ]
    print("| seed | trained | new | old | retain weight | seconds | strength: gained / kept |")
    print("|---:|---|---|---|---:|---:|---|", flush=True)
    worlds: dict[str, World] = {}
    for seed, one in list(product(range(args.seeds), tries))[number::of]:
        world = worlds.setdefault(one.tower, WORLDS[one.tower](args.folder, args.scenes))
        print(run(one, seed, world, args), flush=True)


@dataclass(frozen=True)
class World:
    """Data of one tower's tries: what fits a model into a folder, and its measures of the new and the old."""

    fit: Callable[..., Any]
    new: Callable[[Any], str]
    old: Callable[[Any], str]


def text_world(folder: Path, scenes: int) -> World:
    """Vietnamese captions are new, English ones are old."""
    features = cg.FeatureArgs(feature_cache=folder / "features", autocast=True)
    read = partial(emoji_pairs, folder)
    train, val = read("train", scenes, "vi"), read("val", 500, "vi")
    fit = partial(_fit, cg.fit, (train, val), features)
    return World(
        fit,
        partial(_recalls, read("test", 1_000, "vi"), features),
        partial(_recalls, read("test", 1_000, "en"), features),
    )


def image_world(folder: Path, scenes: int) -> World:
    """The style of the art is new, the classes of objects and English captions are old."""
    features = cg.FeatureArgs(feature_cache=folder / "features", autocast=True)
    train, val, test = (_styled(folder, *of) for of in (("train", _STYLED), ("val", 300), ("test", 1_000)))
    prompts = tuple((f"a picture in the style of {name}",) for name in train.classes)
    fit = partial(_fit, cg.fit_classifier, (train, val), features, prompts=prompts)
    classes = cg.data.read_labelled(
        cg.emoji.write_classes(folder / "classes", "test", _OF_CLASS), progress=False
    )
    english, of_classes = emoji_pairs(folder, "test", 1_000, "en"), emoji_prompts()
    of_class = tuple(of_classes[name] for name in classes.classes)

    def accuracy(data: Any, prompts: Any, clip: Any) -> str:
        found = cg.evaluate_classification(clip, data, prompts, features, progress=False)
        return f"{100 * found.metrics['acc1']:.1f}"

    def old(clip: Any) -> str:
        return f"classes {accuracy(classes, of_class, clip)}, English {_recalls(english, features, clip)}"

    return World(fit, partial(accuracy, test, prompts), old)


WORLDS = {"text": text_world, "vision": image_world}


def run(one: Try, seed: int, world: World, args: argparse.Namespace) -> str:
    """Train one way, and measure: a row of the table."""
    clip = cg.load(args.base)
    if not one.full:
        torch.manual_seed(seed)
        cg.apply_lora(
            clip, **{"r": 16, "targets": MATRICES if one.tower == "text" else "linear-vision", **one.lora}
        )
    options: dict[str, Any] = {
        "lr": _FULL_LR if one.full else _LORA_LR,
        "epochs": args.epochs,
        "batch_size": 128,
        "warmup": 50,
    }
    if one.tower == "vision":
        options |= {"lr": 1e-4 if one.full else _LORA_LR, "epochs": 4, "batch_size": 64}
    locks = {f"lock_{'image' if one.tower == 'text' else 'text'}": True} if one.full else {}
    out = args.folder / "runs" / f"{seed}-{time.time_ns()}"
    retain = _retained(one, clip, args.folder) if one.retain else None
    started = time.perf_counter()
    result = world.fit(clip, {**options, **one.train, **locks, "seed": seed}, out, retain)
    seconds = time.perf_counter() - started
    weight = "" if result.weight is None else f"{result.weight.weight:g}"
    points = () if result.strength is None else result.strength.points
    curve = ", ".join(f"{p.strength:g}: {100 * p.gained:.1f} / {100 * p.kept:.1f}" for p in points)
    new, old = world.new(clip), world.old(clip)
    shutil.rmtree(out)
    return f"| {seed} | {one.name} | {new} | {old} | {weight} | {seconds:.0f} | {curve} |"


def _fit(
    fit: Callable[..., Any],
    data: tuple[Any, Any],
    features: cg.FeatureArgs,
    clip: Any,
    train: Any,
    out: Path,
    retain: Any,
    **more: Any,
) -> Any:
    args = cg.RunArgs(out=out, save_frequency=0, val_frequency=0, progress=False)
    return fit(clip, *data, train=cg.TrainArgs(**train), run=args, features=features, retain=retain, **more)


def _retained(one: Try, clip: cg.Clip, folder: Path) -> cg.data.Retained:
    if not one.pictures:
        return cg.data.retained_texts(clip)
    table = folder / "others" / "train.en.csv"
    if not table.is_file():
        cg.emoji.write_scenes(table.parent, "train", _OTHERS, ["en"], seed=_OTHER_SEED)
    return cg.data.read_retained(table, images=True, progress=False)


def _styled(folder: Path, split: str, size: int) -> Any:
    """Scenes with the style of their art for a class."""
    images = emoji_pairs(folder, split, size, "en").images
    scenes = cg.emoji.EmojiScenes(split, size)
    styles = load_art().styles
    classes = tuple(sorted(styles))
    labels = tuple(classes.index(styles[scenes.scene(index).style]) for index in range(size))
    return cg.data.Labelled(images, labels, classes)


def _recalls(pairs: cg.Pairs, features: cg.FeatureArgs, clip: Any) -> str:
    found = cg.evaluate_retrieval(clip, pairs, features, progress=False)
    return f"{100 * found['image_to_text_R@1']:.1f} / {100 * found['text_to_image_R@1']:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
