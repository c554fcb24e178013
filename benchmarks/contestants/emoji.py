"""Adapt the small base to Vietnamese with the same LoRA by clipgraft and by PEFT, and measure recall."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from benchmarks.child import reset_peak
from benchmarks.contestants.hf_peft import batches, load_model
from benchmarks.contestants.loop import adamw, timed_steps
from benchmarks.contestants.ours import timed_fit
from benchmarks.data import read_table
from benchmarks.settings import WORK

SITES = "linear-text,text.token_embedding,text.proj"
_LORA: dict[str, Any] = {"r": 16, "alpha": 32.0, "dropout": 0.0, "targets": SITES}
_LR, _WEIGHT_DECAY, _BATCH, _WARMUP = 5e-3, 0.1, 256, 50
_LANGUAGE = "vi"


def prepare(train: int, test: int) -> dict[str, Any]:
    """Write scenes, captions, and the new adapter that both start from."""
    for split, size in (("train", train), ("test", test)):
        cg.emoji.write_scenes(_folder(train), split, size, [_LANGUAGE])
    clip = _with_lora()
    cg.save_adapter(clip, _folder(train) / "adapter")
    return {"base": _recall(clip, train)}


def by_clipgraft(train: int, autocast: bool = False, negatives: str = "batch") -> dict[str, Any]:
    """Train one epoch with `fit`, which also encodes the images."""
    clip = _with_lora()
    pairs = cg.read_pairs(_folder(train) / f"train.{_LANGUAGE}.csv", verify="header")
    train_args = cg.TrainArgs(
        batch_size=_BATCH, epochs=1, lr=_LR, wd=_WEIGHT_DECAY, warmup=_WARMUP, negatives=negatives
    )
    values = timed_fit(clip, pairs, train_args, cg.FeatureArgs(autocast=autocast))
    return {**values, "seconds": values["run_seconds"], "recall": _recall(clip, train)}


def by_peft(
    train: int, autocast: bool = False, longest: bool = False, attention: str = "sdpa", workers: int = 2
) -> dict[str, Any]:
    """Train as many steps with transformers + PEFT, with the same batches, schedule and optimizer."""
    from clipgraft.models.load import EMOJI_BASE
    from clipgraft.train.schedule import make_schedule

    model = load_model(EMOJI_BASE, _folder(train) / "adapter", bf16=False, attention=attention)
    rows = read_table(_folder(train) / f"train.{_LANGUAGE}.csv")
    steps = len(rows) // _BATCH
    reset_peak()
    values = timed_steps(
        batches(EMOJI_BASE, rows, batch_size=_BATCH, workers=workers, longest=longest, bf16=False),
        lambda batch: model(**batch, return_loss=True).loss,
        adamw(model, _LR, _WEIGHT_DECAY),
        warmup=0,
        steps=steps,
        autocast=autocast,
        schedule=make_schedule("cosine", _LR, min(_WARMUP, steps // 10), steps),
    )
    clip = cg.load("emoji")
    clip.model = model.merge_and_unload().eval()
    return {**values, "seconds": sum(values["step_seconds"]), "recall": _recall(clip, train)}


def _folder(train: int) -> Path:
    return WORK / f"emoji-{train}"


def _with_lora() -> cg.Clip:
    clip = cg.load("emoji")
    torch.manual_seed(0)
    cg.apply_lora(clip, **_LORA)
    return clip


@cache
def _test_pairs(train: int) -> cg.Pairs:
    return cg.read_pairs(_folder(train) / f"test.{_LANGUAGE}.csv", verify="header")


def _recall(clip: cg.Clip, train: int) -> dict[str, float]:
    """Measure R@1 in both directions on unseen scenes, with the same function for all."""
    metrics = cg.evaluate_retrieval(clip, _test_pairs(train))
    return {name: metrics[name] for name in ("image_to_text_R@1", "text_to_image_R@1")}
