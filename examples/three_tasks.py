"""One base and three tasks: one adapter for each, all in memory, mixed within one batch.

    python examples/three_tasks.py --out three_tasks

The first run trains the adapters, in a minute or two on two cores; later runs take seconds.
Nothing is downloaded: base, images and captions come with clipgraft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

import clipgraft as cg

STYLES = ("noto", "twemoji", "openmoji")  # in the order of `Scene.style`
STYLE_CAPTIONS = ("{} artwork", "drawn by {}", "an emoji of {}", "{} style", "a picture by {}")
LORA: dict[str, Any] = {"r": 16, "alpha": 32, "targets": "linear-text,text.token_embedding,text.proj"}
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 128, "lr": 3e-3, "wd": 0.1, "warmup": 20}
Captions: TypeAlias = Callable[[cg.emoji.EmojiScenes, int], tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """A task, and how to measure it.

    Attributes:
        name: name of the task and of its adapter.
        about: description of the metric.
        captions: returns the captions of a scene by its index.
        metric: computes a score from 0 to 1 from a model, the task's pairs and the features of their images.
    """

    name: str
    about: str
    captions: Captions
    metric: Callable[[cg.Clip, cg.Pairs, Tensor], float]


def in_language(language: str) -> Captions:
    """Five captions of a scene in a language that the base has seen little of."""
    return lambda scenes, index: scenes.captions(index, language)


def of_style(scenes: cg.emoji.EmojiScenes, index: int) -> tuple[str, ...]:
    """Captions that name who drew the emoji of a scene; the base has never seen these names."""
    return tuple(words.format(STYLES[scenes.scene(index).style]) for words in STYLE_CAPTIONS)


def retrieval(clip: cg.Clip, pairs: cg.Pairs, images: Tensor) -> float:
    """Share of captions whose own image comes first."""
    return cg.evaluate_retrieval(clip, pairs, image_features=images)["text_to_image_R@1"]


def classification(clip: cg.Clip, pairs: cg.Pairs, images: Tensor) -> float:
    """Share of images whose nearest prompt is that of their own class."""
    prompts = sorted({captions[0] for captions in pairs.captions})
    with torch.inference_mode():
        features = clip.encode_text(prompts, normalize=True)
    nearest: list[int] = (images @ features.T).argmax(dim=1).tolist()
    right = [prompts[n] == captions[0] for n, captions in zip(nearest, pairs.captions, strict=True)]
    return sum(right) / len(right)


TASKS = (
    Task("vi", "Vietnamese, text to image R@1", in_language("vi"), retrieval),
    Task("tr", "Turkish, text to image R@1", in_language("tr"), retrieval),
    Task("style", "who drew it, accuracy", of_style, classification),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Three tasks on one base.")
    parser.add_argument("--out", type=Path, default=Path("three_tasks"), help="output folder")
    parser.add_argument("--quick", action="store_true", help="a few scenes, to see that everything runs")
    arguments = parser.parse_args(argv)
    train, test = (64, 24) if arguments.quick else (3000, 500)
    started = time.perf_counter()
    train_what_is_missing(arguments.out, train)

    clip = cg.load("emoji")
    base_bytes = bytes_of(clip.model.parameters())
    for task in TASKS:
        cg.load_adapter(clip, arguments.out / "adapters" / task.name, name=task.name, activate=False)
    scenes, files = pictures(arguments.out, "test", test)
    images = image_features(clip, files)

    print_table(clip, scenes, files, images)
    print_mixed_batch(clip, scenes, images)
    print_memory(clip, base_bytes)
    print(f"{time.perf_counter() - started:.0f} seconds")


def train_what_is_missing(out: Path, size: int) -> None:
    """Train one adapter for each task; the first run encodes the images, the others use the cache."""
    missing = [task for task in TASKS if not (out / "adapters" / task.name).exists()]
    if not missing:
        return
    scenes, files = pictures(out, "train", size)
    for task in missing:
        clip = cg.load("emoji")
        torch.manual_seed(0)
        cg.apply_lora(clip, **LORA)
        run = out / "runs" / f"{task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        result = cg.fit(
            clip,
            pairs_of(task, scenes, files),
            train=cg.TrainArgs(**TRAINING),
            run=cg.RunArgs(out=run, progress=False),
            features=cg.FeatureArgs(feature_cache=out / "features", autocast=None),
        )
        cg.save_adapter(clip, out / "adapters" / task.name)
        print(f"trained {task.name!r} in {result.seconds:.0f} s", flush=True)


def pictures(out: Path, split: str, size: int) -> tuple[cg.emoji.EmojiScenes, tuple[Path, ...]]:
    """Write scenes as images; returns the scenes and their files."""
    cg.emoji.write_scenes(out / "data", split, size, [])
    files = tuple(out / "data" / "images" / f"{split}_{i:05d}.png" for i in range(size))
    return cg.emoji.EmojiScenes(split, size), files


def pairs_of(task: Task, scenes: cg.emoji.EmojiScenes, files: tuple[Path, ...]) -> cg.Pairs:
    return cg.Pairs(files, tuple(task.captions(scenes, i) for i in range(len(scenes))))


def image_features(clip: cg.Clip, files: Sequence[Path]) -> Tensor:
    """Encode images as (N, D) features. No adapter changes the image tower, so all tasks share them."""
    preprocess, rows = clip.require_preprocess(), []
    for file in files:
        with Image.open(file) as image:
            rows.append(preprocess(image))
    pixels = torch.stack(rows)
    with torch.inference_mode():
        return torch.cat([clip.encode_image(part, normalize=True) for part in torch.split(pixels, 64)])


def print_table(clip: cg.Clip, scenes: cg.emoji.EmojiScenes, files: tuple[Path, ...], images: Tensor) -> None:
    """Print every adapter on every task; each adapter should be the best in its own column."""
    tests = {task: pairs_of(task, scenes, files) for task in TASKS}
    print("\n" + "adapter".ljust(10) + "".join(task.about.rjust(34) for task in TASKS))
    for name in (None, *(task.name for task in TASKS)):
        cg.set_adapter(clip, name)
        scores = [task.metric(clip, pairs, images) for task, pairs in tests.items()]
        print((name or "none").ljust(10) + "".join(f"{100 * score:.1f} %".rjust(34) for score in scores))


def print_mixed_batch(clip: cg.Clip, scenes: cg.emoji.EmojiScenes, images: Tensor, count: int = 8) -> None:
    """Encode queries of all tasks in one batch, each row with its own adapter or none."""
    sources: list[tuple[str | None, Captions]] = [
        (None, in_language("en")),
        *((task.name, task.captions) for task in TASKS),
    ]
    asked = [(i, *sources[i % len(sources)]) for i in range(count)]
    queries = [captions(scenes, i)[0] for i, _, captions in asked]
    names = [name for _, name, _ in asked]
    with torch.inference_mode():
        together = clip.encode_text(queries, normalize=True, adapters=names)
        rows = zip(queries, names, strict=True)
        alone = [clip.encode_text(query, normalize=True, adapters=[name]) for query, name in rows]
    print("\none batch, an adapter a row")
    for name, query, feature in zip(names, queries, together, strict=True):
        hit = int((images @ feature).argmax())
        print(f"  {name or 'none':<6} {query}")
        print(f"         -> {scenes.captions(hit)[0]} ({STYLES[scenes.scene(hit).style]})")
    difference = float((together - torch.cat(alone)).abs().max())
    print(f"  largest difference from one row at a time: {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("rows of the mixed batch differ from the same rows alone")


def print_memory(clip: cg.Clip, base_bytes: int) -> None:
    """Print the memory of three adapters, and of three fine-tuned copies of the base."""
    sizes = {task.name: bytes_of(cg.adapters.lora_state_dict(clip, task.name).values()) for task in TASKS}
    listed = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sizes.items())
    print(f"\nMB in memory: base {base_bytes / 1e6:.2f}, adapters {listed}")
    print(f"together {(base_bytes + sum(sizes.values())) / 1e6:.1f}, three copies {3 * base_bytes / 1e6:.1f}")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
