"""Measure a smaller CLIP on EmojiScenes: size, time and recall, before and after distillation.

    python -m benchmarks.compact --out benchmarks/results/compact.md

The base is cut to fewer blocks and to the tokens of English captions. One copy is then trained on the pairs
alone, another with the base as its teacher; same scenes, steps and learning rate. Recall is over 1,000 test
scenes with five captions each. Times are of the towers alone, the models in turn, best of many rounds; the
last three models have one shape, so that what their times differ by is noise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from benchmarks.environment import describe
from benchmarks.report import Table, machine, markdown_table
from clipgraft.data.loading import image_batches
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip

_LAYERS: dict[str, Any] = {"text_layers": 2, "vision_layers": 3}
_BATCH, _ROUNDS, _TEST = 64, 12, 1000
_TRAINING: dict[str, Any] = {
    "batch_size": 128,
    "lr": 5e-4,
    "wd": 0.1,
    "warmup": 20,
}
_RECALLS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")


@dataclass(frozen=True)
class World:
    """Generated scenes to train and to test on."""

    train: cg.Pairs
    test: cg.Pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compact", description=__doc__)
    parser.add_argument("--scenes", type=int, default=3000, help="to train on, five captions each")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the page there too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        text = measure(Path(folder), arguments.scenes, arguments.epochs)
    used = os.times()
    busy = used.user + used.system + used.children_user + used.children_system
    text += f"\nThe run took {time.perf_counter() - started:.0f} s, {busy:.0f} s of processor time.\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def measure(folder: Path, scenes: int, epochs: int) -> str:
    """Measure everything and return the page."""
    environment = {**describe(), "threads": torch.get_num_threads()}
    world = make_world(folder, scenes)
    models, seconds = make_models(world, folder, epochs)
    _tell("times")
    times = measure_times(list(models.values()), world.test)
    rows = []
    for (name, clip), spent in zip(models.items(), times, strict=True):
        _tell(f"recall: {name}")
        rows.append(row(name, clip, spent, cg.evaluate_retrieval(clip, world.test), seconds.get(name)))
    columns = (
        "model",
        "parameters",
        "ms/image",
        "ms/caption",
        "I→T R@1",
        "R@5",
        "T→I R@1",
        "R@5",
        "training, s",
    )
    setting = (
        f"{scenes:,} training scenes with five captions each, {epochs} epoch{'s' * (epochs != 1)} of batches "
        f"of {_TRAINING['batch_size']}, learning rate {_TRAINING['lr']:g}."
    )
    parts = [
        "# A smaller CLIP",
        _about(),
        setting,
        machine(environment),
        markdown_table(Table(columns, tuple(rows))),
    ]
    return "\n\n".join(parts) + "\n"


def _about() -> str:
    """Return the module's description without the command."""
    paragraphs = [part for part in (__doc__ or "").split("\n\n") if not part.startswith("    ")]
    return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def make_world(folder: Path, scenes: int) -> World:
    """Write English scenes and read them back as a user's data."""
    _tell("scenes")
    sizes = {"train": scenes, "test": _TEST}
    tables = {
        split: cg.emoji.write_scenes(folder / split, split, size, ["en"])["en"]
        for split, size in sizes.items()
    }
    pairs = {split: cg.read_pairs(table, verify="header") for split, table in tables.items()}
    return World(pairs["train"], pairs["test"])


def make_models(world: World, folder: Path, epochs: int) -> tuple[dict[str, Clip], dict[str, float]]:
    """Build the models by name, and return the seconds that training took."""
    base = cg.load("emoji")
    texts = [caption for captions in world.train.captions for caption in captions]
    cut = [cg.compact.compact_model(base, **_LAYERS, texts=texts).clip for _ in range(3)]
    models = {
        "base": base,
        "fewer tokens": cg.compact.compact_model(base, texts=texts).clip,
        "fewer tokens and blocks": cut[0],
        "the same, trained on the pairs": cut[1],
        "the same, distilled": cut[2],
    }
    seconds = {}
    for name, train in (
        ("the same, trained on the pairs", cg.fit),
        ("the same, distilled", partial(cg.distill, teacher=base)),
    ):
        _tell(name)
        out = folder / name.replace(" ", "-")
        result = train(
            models[name],
            pairs=world.train,
            train=cg.TrainArgs(epochs=epochs, **_TRAINING),
            run=cg.RunArgs(out=out, progress=False),
            features=cg.FeatureArgs(autocast=None),
        )
        seconds[name] = result.seconds
    return models, seconds


def measure_times(clips: Sequence[Clip], test: cg.Pairs) -> list[tuple[float, float]]:
    """Return milliseconds for an image and for a caption, for every model."""
    (_, pixels), *_ = image_batches(
        test.images[:_BATCH], clips[0].require_preprocess(), batch_size=_BATCH, workers=0
    )
    captions = [texts[0] for texts in test.captions[:_BATCH]]
    runs: list[Callable[[], object]] = []
    for clip in clips:
        encoder, tokens = Encoder(clip), clip.tokenize(captions)
        runs.append(lambda encoder=encoder: encoder.encode_image(pixels))  # type: ignore[misc]
        runs.append(lambda encoder=encoder, tokens=tokens: encoder.encode_text(tokens))  # type: ignore[misc]
    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            for number, run in enumerate(runs):
                started = time.perf_counter()
                run()
                best[number] = min(best[number], time.perf_counter() - started)
    each = [1e3 * seconds / _BATCH for seconds in best]
    return list(zip(each[::2], each[1::2], strict=True))


def row(
    name: str, clip: Clip, times: tuple[float, float], metrics: Mapping[str, float], seconds: float | None
) -> tuple[str, ...]:
    """Format one row of the table."""
    recalls = [f"{100 * metrics[recall]:.1f}" for recall in _RECALLS]
    spent = "" if seconds is None else f"{seconds:.0f}"
    total = f"{cg.count_parameters(clip).total:,}"
    return (name, total, f"{times[0]:.2f}", f"{times[1]:.3f}", *recalls, spent)


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
