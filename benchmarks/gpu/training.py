"""Whole epochs from JPEGs, with reading and decoding, as users meet them."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import torch

from benchmarks.contestants.loop import adamw
from benchmarks.data import read_table
from benchmarks.environment import usable_cores
from benchmarks.gpu.bench import Bench, Values, our_clip, peft_model
from benchmarks.gpu.steps import timed_steps
from benchmarks.prepare import HF_BASE, LORA


def ours(bench: Bench, targets: str, autocast: bool) -> Values:
    """Time every epoch of `fit`, the first with nothing cached."""
    import clipgraft as cg

    clip, pairs, ends = our_clip(bench), cg.read_pairs(bench.table, verify="header"), []

    class Clock(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "mean loss" in record.getMessage():
                ends.append(bench.now())

    clock, logger = Clock(), logging.getLogger("clipgraft")
    logger.addHandler(clock)
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=0.1, targets=targets)
    bench.reset_peak()
    started = bench.now()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cg.fit(
            clip,
            pairs,
            train=cg.TrainArgs(
                batch_size=bench.batch,
                epochs=bench.epochs,
                negatives="batch",
                lr_scheduler="const",
                warmup=0,
            ),
            run=cg.RunArgs(out=out, progress=False, save_frequency=0),
            features=cg.FeatureArgs(autocast=autocast, workers=usable_cores()),
        )
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    logger.removeHandler(clock)
    marks = [started, *ends]
    epochs = [end - start for start, end in zip(marks, ends, strict=False)]
    losses = [event["loss"] for event in events if event["kind"] == "train"]
    return {"epochs": epochs, "losses": losses[: bench.steps], **bench.peak()}


def peft(bench: Bench, targets: str, autocast: bool, bf16: bool = False) -> Values:
    """Time every epoch of transformers + PEFT; its loader continues from one epoch to the next."""
    from benchmarks.contestants.hf_peft import batches

    model = peft_model(bench, targets, bf16)
    data = batches(
        HF_BASE,
        read_table(bench.table),
        batch_size=bench.batch,
        workers=usable_cores(),
        longest=True,
        bf16=bf16,
    )
    torch.manual_seed(0)
    moved = ({name: t.to(bench.device, non_blocking=True) for name, t in batch.items()} for batch in data)
    steps = bench.images // bench.batch
    started = bench.now()
    found = timed_steps(
        bench,
        moved,
        lambda b: model(**b, return_loss=True).loss,
        adamw(model, fused=True),
        autocast,
        0,
        bench.epochs * steps,
    )
    # Workers make batches ahead: an epoch's own seconds say little, those of all later ones together do.
    whole = bench.now() - started
    later = sum(found.pop("step_seconds")[steps:]) / (bench.epochs - 1)
    return {"epochs": [whole - later * (bench.epochs - 1), *[later] * (bench.epochs - 1)], **found}
