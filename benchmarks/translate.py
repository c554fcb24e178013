"""`python -m benchmarks.translate FOLDER`: a language learnt from translations, from pairs, and from both.

The embedded base learns Vietnamese, Turkish and Greek captions by an adapter of rank 16 on every matrix of
the text tower (`--targets` names others): from English captions with their translations, from the pictures of
the same scenes with the translated captions, or from both, at 500, 2,000 and 8,000 sentences, one a scene.
The scenes are none that the base was trained on. R@1 on 1,000 unseen test scenes with five captions each.

Every cell has the same learning rate, and about as many steps as the others of its size; the rows of a cell
that has both are those of the two together. Prints a line for each cell.
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
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("clipgraft").setLevel(logging.WARNING)
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

    translated = dict.fromkeys(captions("en"), ())
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
