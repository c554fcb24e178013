"""Training runs whose result must be the same in one process and in two.

Run as a program, this is what each of the two processes does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.retained import Retained
from clipgraft.engine import attention
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from clipgraft.train import inputs as inputs_module
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.feed import Feed, LiveImages, LiveTexts, everywhere
from clipgraft.train.fit import distill, fit_classifier
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.launch import joined
from clipgraft.train.loop import Interrupted, Loop
from clipgraft.train.recipes.contrastive import Contrastive
from clipgraft.train.recipes.pair_losses import SoftmaxLoss
from fitting import groups
from tiny_siglip import with_logit_bias

PAIRS_IN_A_STEP = 8
BOTH = "text.*.q,v,fc1,vision.*.q,v,fc1"
SETTINGS: dict[str, Any] = {"epochs": 2, "lr": 1e-3, "warmup": 0, "workers": 0, "progress": False}
CLASSES = ("even", "odd", "third")
PROMPTS = (("an even picture", "even"), ("an odd picture",), ("a third picture", "the third"))
RETAINED = Retained(tuple(f"a text number {number} to keep" for number in range(40)), weight=2.0)
Case = Callable[[Clip, Path, Path, World], object]


def with_adapters(clip: Clip, targets: str, **options: Any) -> Clip:
    """Apply LoRA with a random B, so that no gradient is zero."""
    torch.manual_seed(1)
    cg.apply_lora(clip, **{"r": 2, "targets": targets, "train_logit_scale": True, **options})
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return clip


def step(world: World, accum_freq: int = 1) -> dict[str, int]:
    """Choose the batch size that gives a step the same number of pairs in any number of processes."""
    return {"batch_size": PAIRS_IN_A_STEP // world.world_size // accum_freq, "accum_freq": accum_freq}


def on_pairs(
    clip: Clip, table: Path, out: Path, world: World, *, targets: str | None, accum_freq: int = 1, **more: Any
) -> object:
    """Run `fit`; without targets all weights train."""
    if targets is not None:
        with_adapters(clip, targets, **more.pop("lora", {}))
    if more.pop("cached", False):
        more["cache"] = FeatureCache(out.parent / f"cache-{out.name}")
    pairs = cg.read_pairs(table)
    return cg.fit(
        clip, pairs, pairs, **groups(out=out, world=world, **SETTINGS, **step(world, accum_freq), **more)
    )


def on_siglip(clip: Clip, table: Path, out: Path, world: World, **options: Any) -> object:
    """Run `fit` on the same weights with a `logit_bias`."""
    return on_pairs(with_logit_bias(clip), table, out, world, **options)


def on_classes(
    clip: Clip, table: Path, out: Path, world: World, *, targets: str | None, head: Any = "prompts"
) -> object:
    """Run `fit_classifier` on classes of unequal size and weight; without targets the head alone trains."""
    options: dict[str, Any] = {"weights": [1.0, 2.0, 4.0], "head": head}
    if targets is None:
        options |= {"lock_image": True, "lock_text": True}
        clip.logit_scale.requires_grad_(False)
    else:
        with_adapters(clip, targets, train_logit_scale=head == "prompts")
    images = cg.read_pairs(table).images
    data = Labelled(images, tuple(index % 5 % 3 for index in range(len(images))), CLASSES)
    options |= {**SETTINGS, **step(world)}
    return fit_classifier(clip, data, data, **groups(prompts=PROMPTS, out=out, world=world, **options))


def from_teacher(clip: Clip, table: Path, out: Path, world: World) -> object:
    """Run `distill` from a teacher that differs from the student."""
    teacher = load(clip.source.name, "none")
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(1.1)
    pairs = cg.read_pairs(table)
    return distill(
        with_adapters(clip, BOTH), teacher, pairs, **groups(out=out, world=world, **SETTINGS, **step(world))
    )


CASES: dict[str, Case] = {
    "text tower": partial(on_pairs, targets="text-attention", negatives="batch"),
    "gallery": partial(on_pairs, targets="text-attention", negatives="gallery", grad_clip_norm=0.01),
    "both towers": partial(on_pairs, targets=BOTH),
    "crops": partial(on_pairs, targets=BOTH, augment=True, accum_freq=2),
    # A key's bias has no gradient but rounding errors, which Adam divides by their own size, and eps hides.
    "all weights": partial(on_pairs, targets=None, eps=1e-4),
    "sigmoid": partial(on_siglip, targets=BOTH, accum_freq=2),
    "sigmoid over a gallery": partial(on_siglip, targets="text-attention"),
    "sigmoid, all weights": partial(on_siglip, targets=None, eps=1e-4),
    "softmax, and a bias": partial(on_siglip, targets=BOTH, loss="softmax"),
    "softmax, and a bias, all weights": partial(on_siglip, targets=None, loss="softmax", eps=1e-3),
    "upper blocks in memory": partial(on_pairs, targets="vision.1.*"),
    "upper blocks in the cache": partial(on_pairs, targets="vision.1.*,text.*.fc1", cached=True),
    "prompts": partial(on_classes, targets=BOTH),
    "fixed prompts": partial(on_classes, targets="vision.*.fc1"),
    "linear head": partial(on_classes, targets=None, head="linear"),
    "cosine head": partial(on_classes, targets="vision.1.fc1", head="cosine"),
    "distillation": from_teacher,
    "retained": partial(on_pairs, targets=BOTH, retain=RETAINED, accum_freq=2),
    "retained by images": partial(on_pairs, targets="vision.1.*", retain=RETAINED),
}
QUICK = ("text tower", "crops", "prompts", "retained", "sigmoid")
DROPPING = {"targets": BOTH, "lora": {"dropout": 0.3}, "augment": True, "accum_freq": 2}


def gradients(clip: Clip, table: Path, world: World, accum_freq: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute loss and gradients of one step in fp64."""
    with_adapters(clip, BOTH).train().model.double()
    clip.logit_scale.data = clip.logit_scale.data.double()
    pairs, encoder = cg.read_pairs(table), Encoder(clip)
    size = step(world, accum_freq)
    feed = Feed(pairs, size["batch_size"], accum_freq, 0, clip.require_preprocess(), 0, world)
    batch = next(feed.batches(0, 1))
    pair_loss = SoftmaxLoss(clip.logit_scale)
    objective = Contrastive(clip, LiveImages(encoder), LiveTexts(encoder, feed.captions), pair_loss)
    loss = contrastive_backward(objective.parts(batch), objective.loss(everywhere(batch, world)), world)
    world.sum_gradients(list(clip.model.parameters()))
    return loss, {name: p.grad for name, p in clip.model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def asked_to_stop(world: World, rank: int, at: int) -> Iterator[None]:
    """Send SIGTERM to one rank alone in step `at`, and expect Interrupted in all."""
    real = Loop.step

    def stepping(self: Loop, batch: Any, number: int) -> Any:
        if world.rank == rank and number == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", stepping)
        try:
            yield
        except Interrupted:
            return
    raise AssertionError("was not interrupted")


def run_case(name: str, config: Path, table: Path, out: Path, world: World = ALONE) -> None:
    """Train as a case says, into `out / name`."""
    CASES[name](load(str(config), "none"), table, out / name, world)


def main(config: Path, table: Path, out: Path, *names: str) -> None:
    """Run the named cases, then runs that are stopped and resumed; each of the two processes calls this."""
    torch.set_num_threads(1)
    attention.best_seconds = lambda run: (run(), 1.0)[1]  # every process takes the first kernel
    encode, shares = inputs_module.encode_images, []

    def counted(clip: Clip, paths: Any, **options: Any) -> Tensor:
        shares.append(len(paths))
        return encode(clip, paths, **options)

    def fresh() -> Clip:
        return load(str(config), "none")

    with joined() as world:
        for accum_freq in (1, 2):
            found = gradients(fresh(), table, world, accum_freq)
            torch.save(found, out / f"gradients-{accum_freq}-{world.rank}.pt")
        for name in names:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(inputs_module, "encode_images", counted)
                shares.clear()
                run_case(name, config, table, out, world)
            (out / f"shares-{name}-{world.rank}.json").write_text(json.dumps(shares))
        on_pairs(fresh(), table, out / "whole", world, **DROPPING)
        for target, case in (("resumed", DROPPING), ("left", {"targets": BOTH})):
            with asked_to_stop(world, 1, 4):
                on_pairs(fresh(), table, out / target, world, **case)
        on_pairs(fresh(), table, out / "resumed", world, resume=True, **DROPPING)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
