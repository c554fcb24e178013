"""`clipgraft demo`: adapt the embedded model, and compare base, LoRA and full fine-tuning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli.flags.tools import DemoFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.errors import ConfigError
from clipgraft.ours import DEMO_MARK, mark_folder, refuse_foreign
from clipgraft.text_tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.data.args import FeatureArgs
    from clipgraft.data.datasets import Pairs
    from clipgraft.data.retained import Retained
    from clipgraft.models.clip import Clip
    from clipgraft.train.run import FitResult

log = logging.getLogger("clipgraft")
_SUMMARY = "Adapt the embedded CLIP to another language; compare base, LoRA and full fine-tuning."
# The best of what was tried for each, at equal steps: benchmarks/results/forgetting.md.
_LORA = {"r": 32, "alpha": 64, "dropout": 0.0, "targets": "linear-text,text.token_embedding,text.proj"}
_COMMON: dict[str, Any] = {"batch_size": 128, "wd": 0.1, "warmup": 50}
_LORA_LR, _FULL_LR = 3e-3, 1e-3
_RETAIN_WEIGHT = 30.0
_GALLERY_QUERIES, _GALLERY_TOP = 6, 5


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; recalls in percent."""

    model: str
    image_to_text_r1: float
    image_to_text_r5: float
    text_to_image_r1: float
    text_to_image_r5: float
    trainable: int
    megabytes: float
    seconds: float
    english_image_to_text_r1: float
    english_text_to_image_r1: float


@dataclass(frozen=True)
class World:
    """The demo's data: training pairs in the new language, test pairs in it and in English.

    `autocast` is what everything is computed in.
    """

    train: Pairs
    test: Pairs
    test_english: Pairs
    test_images: Tensor
    autocast: bool


def run_demo(argv: Sequence[str]) -> None:
    """Make the data, train both ways, print the table, draw the picture."""
    (spec,) = parse("demo", _SUMMARY, [DemoFlags], argv)
    started = time.perf_counter()
    refuse_foreign(spec.out, spec.overwrite, ConfigError, "--out")
    mark_folder(spec.out, DEMO_MARK)
    import torch

    from clipgraft.data.retained import retained_texts
    from clipgraft.files import write_json
    from clipgraft.lora.inject import apply_lora

    base = load_base()
    world = make_world(spec, base)
    rows = [measure("base", base, world, None)]
    runs = spec.out / f"runs-{time.strftime('%Y%m%d-%H%M%S')}"

    log.info("LoRA r=%d on %s", _LORA["r"], _LORA["targets"])
    adapted = load_base()
    torch.manual_seed(spec.seed)
    apply_lora(adapted, **_LORA)  # type: ignore[arg-type]
    lora = train(adapted, world, spec, runs / "lora", _LORA_LR, retained_texts(adapted, _RETAIN_WEIGHT))
    rows.append(measure(f"LoRA r={_LORA['r']}", adapted, world, lora))

    log.info("full fine-tuning of the text tower, for comparison")
    tuned = load_base()
    full = train(tuned, world, spec, runs / "full", _FULL_LR, None, lock_image=True)
    rows.append(measure("full fine-tuning", tuned, world, full))

    picture = spec.out / "gallery.png"
    queries = {
        row.model: caption_features(clip, world.test)
        for row, clip in zip(rows, (base, adapted), strict=False)
    }
    draw(picture, world, queries)
    write_json(spec.out / "results.json", [asdict(row) for row in rows])
    print()
    show(table(rows, spec.language), verdict(rows))
    print(f"adapter  {lora.saved}\npicture  {picture}\nseconds  {time.perf_counter() - started:.0f}")


def load_base() -> Clip:
    """Load the embedded base."""
    from clipgraft.adapters.open import load

    return load("emoji")


def make_world(spec: DemoFlags, base: Clip) -> World:
    """Write scenes and captions like a user's data, read them back, and encode the images once."""
    from clipgraft.data.features import encode_images
    from clipgraft.data.reader import read_pairs
    from clipgraft.emoji.scenes import write_scenes
    from clipgraft.models.device import bf16_is_fast, what_auto_chooses

    log.info("making %d training and %d test scenes in %s", spec.train_scenes, spec.test_scenes, spec.out)
    data = spec.out / "data"
    tables = write_scenes(data, "train", spec.train_scenes, [spec.language], seed=spec.seed)
    tests = write_scenes(data, "test", spec.test_scenes, [spec.language, "en"], seed=spec.seed)
    train_pairs, test, english = (
        read_pairs(path, verify="header")
        for path in (tables[spec.language], tests[spec.language], tests["en"])
    )
    autocast = bf16_is_fast(base.device)
    log.info("%s", what_auto_chooses(base.device))
    log.info("the image tower is frozen: each image is encoded once")
    features = features_in(spec, autocast)
    _, test_images = (encode_images(base, p.images, features) for p in (train_pairs, test))
    return World(train_pairs, test, english, test_images, autocast)


def train(
    clip: Clip, world: World, spec: DemoFlags, out: Path, lr: float, retain: Retained | None, **options: Any
) -> FitResult:
    """Train a model with the demo's settings."""
    from clipgraft.train.args import RunArgs, TrainArgs
    from clipgraft.train.fit import fit

    options = {"epochs": spec.epochs, "lr": lr, "seed": spec.seed, **_COMMON, **options}
    return fit(
        clip,
        world.train,
        world.test,  # measured before the first step and after the last, so that it chooses nothing
        train=TrainArgs(**options),
        run=RunArgs(out=out, val_frequency=0, save_frequency=0, strength="none"),
        retain=retain,
        features=features_in(spec, world.autocast),
    )


def features_in(spec: DemoFlags, autocast: bool) -> FeatureArgs:
    """How images become features: once, for the folder of the demonstration."""
    from clipgraft.data.args import FeatureArgs

    return FeatureArgs(feature_cache=spec.out / "features", autocast=autocast)


def measure(name: str, clip: Clip, world: World, result: FitResult | None) -> Row:
    """Measure retrieval in the new language and in English."""
    from clipgraft.evaluate.retrieval import evaluate_retrieval

    new, english = (
        evaluate_retrieval(clip, pairs, image_features=world.test_images, autocast=world.autocast)
        for pairs in (world.test, world.test_english)
    )
    row = Row(
        name,
        100 * new["image_to_text_R@1"],
        100 * new["image_to_text_R@5"],
        100 * new["text_to_image_R@1"],
        100 * new["text_to_image_R@5"],
        result.trainable if result else 0,
        result.bytes / 1e6 if result else 0.0,
        result.seconds if result else 0.0,
        100 * english["image_to_text_R@1"],
        100 * english["text_to_image_R@1"],
    )
    log.info("%s: R@1 %.1f %% / %.1f %%", name, row.image_to_text_r1, row.text_to_image_r1)
    return row


def caption_features(clip: Clip, pairs: Pairs) -> Tensor:
    """Encode the first caption of every image, for the gallery's queries."""
    from clipgraft.data.features import encode_captions

    return encode_captions(clip, [captions[0] for captions in pairs.captions])


def draw(path: Path, world: World, queries: dict[str, Tensor]) -> None:
    """Draw queries with the images found, a column per model; queries on which the models differ first."""
    from clipgraft.report.gallery import draw_gallery

    found = {
        name: (features @ world.test_images.T).topk(_GALLERY_TOP).indices
        for name, features in queries.items()
    }
    base, adapted = found.values()
    differing = [row for row in range(len(world.test)) if (base[row, 0] == row) != (adapted[row, 0] == row)]
    others = [row for row in range(len(world.test)) if row not in set(differing)]
    shown = (differing + others)[:: max(1, len(differing) // _GALLERY_QUERIES)][:_GALLERY_QUERIES]
    images = world.test.images
    draw_gallery(
        path,
        [world.test.captions[row][0] for row in shown],
        [(name, [[images[i] for i in top[row]] for row in shown]) for name, top in found.items()],
        [[place_of(row, top[row].tolist()) for row in shown] for top in found.values()],
        title="Captions on which the first image differs; the true one is framed in green",
    )


def place_of(row: int, top: list[int]) -> int | None:
    return top.index(row) if row in top else None


def table(rows: Sequence[Row], language: str) -> Table:
    """Make the demo's table: recalls in percent in both directions, and costs."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.model,
        "I->T R@1": lambda row: f"{row.image_to_text_r1:.1f}",
        "I->T R@5": lambda row: f"{row.image_to_text_r5:.1f}",
        "T->I R@1": lambda row: f"{row.text_to_image_r1:.1f}",
        "T->I R@5": lambda row: f"{row.text_to_image_r5:.1f}",
        "trained": lambda row: f"{row.trainable:,}",
        "MB": lambda row: f"{row.megabytes:.2f}",
        "seconds": lambda row: f"{row.seconds:.0f}",
        "en I->T R@1": lambda row: f"{row.english_image_to_text_r1:.1f}",
        "en T->I R@1": lambda row: f"{row.english_text_to_image_r1:.1f}",
    }
    return Table(
        f"retrieval on unseen scenes, captions in '{language}' (en: English, what was forgotten)",
        tuple(columns),
        tuple(tuple(show(row) for show in columns.values()) for row in rows),
    )


def verdict(rows: Sequence[Row]) -> str:
    """Say in one line what the adapter gains."""
    base, lora, full = rows
    reached = (lora.image_to_text_r1 + lora.text_to_image_r1) / (
        full.image_to_text_r1 + full.text_to_image_r1
    )
    share = 100 * lora.trainable / full.trainable
    kept = [
        100
        * (row.english_image_to_text_r1 + row.english_text_to_image_r1)
        / (base.english_image_to_text_r1 + base.english_text_to_image_r1)
        for row in (lora, full)
    ]
    return (
        f"LoRA reaches {100 * reached:.1f} % of full fine-tuning's R@1 with {share:.1f} % of its trained "
        f"weights,\nand keeps {kept[0]:.1f} % of the base's English R@1, held to it on English texts alone; "
        f"full fine-tuning, which is not, keeps {kept[1]:.1f} %"
    )
