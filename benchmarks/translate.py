"""`python -m benchmarks.translate FOLDER`: a language learnt from translations, from pairs, and from both.

The embedded base learns Vietnamese, Turkish and Greek captions by an adapter of rank 16 on every matrix of
the text tower (`--targets` names others): from English captions with their translations, from the pictures of
the same scenes with the translated captions, or from both, at 500, 2,000 and 8,000 sentences, one a scene.
The scenes are none that the base was trained on. R@1 on 1,000 unseen test scenes with five captions each.

Every cell has the same learning rate, and about as many steps as the others of its size; the rows of a cell
that has both are those of the two together. Prints a line for each cell.

`--names` learns short texts instead: the names of the emoji base's objects, from their English names alone,
and tells pictures of single objects apart by them.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from benchmarks.defaults import emoji_pairs
from clipgraft.data.datasets import Labelled
from clipgraft.emoji.art import EmojiObject, load_art
from clipgraft.emoji.drawing import Stream, arrange, paint
from clipgraft.evaluate.classification import evaluate_classification

LANGUAGES = {"vi": "Vietnamese", "tr": "Turkish", "el": "Greek"}
SIZES = (500, 2_000, 8_000)
SOURCES = ("translations", "pairs", "both")
_SEED = 1_000_005  # of scenes that no other set has
_ALIKE = (0, 1, 2, 4)  # of the five captions of a scene, those that say the same in all languages
_ROWS = {
    500: 12_000,
    2_000: 24_000,
    8_000: 32_000,
}  # that a cell of one kind of data trains on, epochs together
_TEST = 1_000
_PICTURES = 4  # of each object
_NAME_EPOCHS = 240


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells, or those that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.translate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--targets", default="text-matrices")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=cg.train.TranslateArgs().translation_weight)
    parser.add_argument("--names", action="store_true", help="learn names of single objects")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
    (learn_names if args.names else learn_scenes)(args)


def learn_scenes(args: argparse.Namespace) -> None:
    """Recall on scenes of each cell, before and after."""
    print("| language | sentences | learnt from | R@1 there | R@1 in English | seconds |")
    print("|---|---:|---|---:|---:|---:|", flush=True)
    features = cg.FeatureArgs(feature_cache=args.folder / "features", autocast=True, workers=0)
    tests = {code: emoji_pairs(args.folder, "test", _TEST, code) for code in ("en", *LANGUAGES)}
    _pictures(args.folder, 0)
    base = cg.load("emoji")
    before = {code: _recalls(base, pairs, features) for code, pairs in tests.items()}
    for code in args.languages.split(","):
        print(f"| {LANGUAGES[code]} | 0 | the base | {before[code]} | {before['en']} | |", flush=True)
    cells = product(map(int, args.sizes.split(",")), args.languages.split(","), args.sources.split(","))
    for size, code, source in cells:
        started = time.perf_counter()
        clip = learn(args, size, code, source, features)
        seconds = time.perf_counter() - started
        there, english = (_recalls(clip, tests[name], features) for name in (code, "en"))
        print(
            f"| {LANGUAGES[code]} | {size:,} | {source} | {there} | {english} | {seconds:.0f} |", flush=True
        )


def learn(args: argparse.Namespace, size: int, code: str, source: str, features: cg.FeatureArgs) -> cg.Clip:
    """Train the base on one cell's data."""
    scenes = cg.emoji.EmojiScenes("train", size, _SEED)

    def captions(language: str) -> list[str]:
        return [scenes.captions(i, language)[_ALIKE[i % len(_ALIKE)]] for i in range(size)]

    translated: dict[str, tuple[str, ...]] = dict.fromkeys(captions("en"), ())
    for english, text in zip(captions("en"), captions(code), strict=True):
        translated[english] = (*translated[english], text)
    texts = cg.data.Translations(tuple(translated), tuple(translated.values()))
    pairs = cg.Pairs(_pictures(args.folder, size), tuple((text,) for text in captions(code)))
    clip = cg.load("emoji")
    torch.manual_seed(0)
    cg.apply_lora(clip, r=16, targets=args.targets)
    of_pairs, of_texts = size, 2 * size
    rows = {"pairs": of_pairs, "translations": of_texts, "both": of_pairs + of_texts}[source]
    wanted = _ROWS[size] if source != "both" else 3 * _ROWS[size] // 2
    out = args.folder / "runs" / f"{time.time_ns()}"
    settings: dict[str, Any] = {
        "train": cg.TrainArgs(lr=args.lr, epochs=max(1, round(wanted / rows)), batch_size=128, warmup=50),
        "run": cg.RunArgs(out=out, save_frequency=0, strength="none", progress=False, track="none"),
        "features": features,
    }
    if source == "pairs":
        cg.fit(clip, pairs, **settings)
    else:
        options = cg.train.TranslateArgs(translation_weight=args.weight)
        mixed = pairs if source == "both" else None
        cg.fit_translations(clip, texts, pairs=mixed, options=options, **settings)
    shutil.rmtree(out)
    return clip


def learn_names(args: argparse.Namespace) -> None:
    """Accuracy in percent of telling objects apart by their names, before and after translations."""
    features = cg.FeatureArgs(feature_cache=args.folder / "features", autocast=True, workers=0)
    pictures = _single_objects(args.folder / "objects")
    objects = load_art().objects
    english = [_name(thing, "en") for thing in objects]

    def accuracy(clip: cg.Clip, names: Sequence[str]) -> float:
        prompts = [(name,) for name in names]
        return 100 * evaluate_classification(clip, pictures, prompts, features).metrics["acc1"]

    print("| language | base | after translations | English then | seconds |")
    print("|---|---:|---:|---:|---:|", flush=True)
    for code in args.languages.split(","):
        names = [_name(thing, code) for thing in objects]
        clip = cg.load("emoji")
        before = accuracy(clip, names)
        torch.manual_seed(0)
        cg.apply_lora(clip, r=16, targets=args.targets)
        together: dict[str, tuple[str, ...]] = dict.fromkeys(english, ())
        for source, name in zip(english, names, strict=True):
            together[source] = (*together[source], name)
        out, started = args.folder / "runs" / f"{time.time_ns()}", time.perf_counter()
        cg.fit_translations(
            clip,
            cg.data.Translations(tuple(together), tuple(together.values())),
            train=cg.TrainArgs(lr=args.lr, epochs=_NAME_EPOCHS, batch_size=64, warmup=50),
            run=cg.RunArgs(out=out, save_frequency=0, strength="none", progress=False, track="none"),
            features=features,
        )
        seconds = time.perf_counter() - started
        shutil.rmtree(out)
        found = " | ".join(
            f"{value:.1f}" for value in (before, accuracy(clip, names), accuracy(clip, english))
        )
        print(f"| {LANGUAGES[code]} | {found} | {seconds:.0f} |", flush=True)


def _name(thing: EmojiObject, language: str) -> str:
    if language == "vi":
        return thing.vietnamese
    return thing.english[0] if language == "en" else thing.names[language]


def _single_objects(folder: Path) -> Labelled:
    """Pictures that show one object each, drawn once."""
    art = load_art()
    images, labels = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number, thing in enumerate(art.objects):
        for index in range(_PICTURES):
            key, path = f"names/{number}/{index}", folder / f"{thing.code}-{index}.png"
            if not path.is_file():
                scene = arrange(Stream(key), [number], (1.0, 0.0, 0.0, 0.0), range(len(art.styles)))
                paint(scene, key).save(path)
            images.append(path)
            labels.append(number)
    return Labelled(tuple(images), tuple(labels), tuple(thing.code for thing in art.objects))


def _pictures(folder: Path, size: int) -> tuple[Path, ...]:
    """The pictures of the first scenes, drawn once for the largest size."""
    place = folder / "scenes"
    paths = tuple(place / "images" / f"train_{i:05d}.png" for i in range(max(SIZES)))
    if not paths[-1].is_file():
        cg.emoji.write_scenes(place, "train", max(SIZES), [], _SEED)
    return paths[:size]


def _recalls(clip: cg.Clip, pairs: cg.Pairs, features: cg.FeatureArgs) -> str:
    found = cg.evaluate_retrieval(clip, pairs, features, progress=False)
    return f"{100 * found['image_to_text_R@1']:.1f} / {100 * found['text_to_image_R@1']:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
