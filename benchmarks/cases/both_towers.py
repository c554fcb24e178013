"""LoRA in the attention of both towers: nothing can be cached, every step decodes and encodes its images."""

from __future__ import annotations

from benchmarks.cases.training import memory_ratio, step_ratio, step_seconds, step_table
from benchmarks.measure import Contestant, Runs
from benchmarks.report import Chapter, at_least, at_most
from benchmarks.settings import PEER_WORKERS, Settings

OURS, OURS_FP32 = "clipgraft, bf16", "clipgraft, fp32"
PEFT = "PEFT, fp32, padded to 77"
PEFT_BEST = "PEFT, bf16 autocast, padded to longest, eager attention"
PEFT_FP32, PEFT_BF16 = "PEFT, fp32, padded to longest", "PEFT, bf16 weights, padded to longest"
GRADIENTS = "gradients"
_IN_QUICK = (OURS, PEFT_BEST)


def contestants(settings: Settings) -> list[Contestant]:
    table = str(settings.data / "natural.csv")
    ours = {
        "table": table,
        "targets": "attention",
        "batch_size": settings.both_towers_batch,
        "warmup": settings.warmup,
        "steps": settings.steps,
    }
    # As many rows as ours goes over, so that all draw the same batches.
    rows = settings.both_towers_batch * (settings.warmup + settings.steps)
    peer = {**ours, "workers": PEER_WORKERS, "rows": rows}
    listed = [
        (OURS, "ours:train_steps", {**ours, "autocast": True}),
        (PEFT_BEST, "hf_peft:train", {**peer, "longest": True, "autocast": True, "attention": "eager"}),
        (PEFT_BF16, "hf_peft:train", {**peer, "longest": True, "bf16": True}),
        (OURS_FP32, "ours:train_steps", ours),
        (PEFT_FP32, "hf_peft:train", {**peer, "longest": True}),
        (PEFT, "hf_peft:train", peer),
    ]
    found = [
        Contestant(name, f"contestants.{function}", options)
        for name, function, options in listed
        if name in _IN_QUICK or not settings.quick
    ]
    gradients = {"table": table, "rows": settings.parity_batch}
    return [*found, Contestant(GRADIENTS, "contestants.gradients:compare", gradients, repeats=1)]


def report(settings: Settings, runs: Runs) -> Chapter:
    trained = {name: values for name, values in runs.items() if name != GRADIENTS}
    # The goal is against the peer's best: the faster of its two ways to compute in bf16.
    there = [name for name in (PEFT_BEST, PEFT_BF16) if name in trained]
    best = min(there, key=lambda name: step_seconds(trained[name]).median, default=PEFT_BEST)
    gradients = runs[GRADIENTS][0] if GRADIENTS in runs else None
    difference = gradients["largest_relative_difference"] if gradients else None
    text = (
        f"r=16 on q, k, v and out of all 24 blocks, batches of {settings.both_towers_batch}, a step with "
        f"reading and decoding its images; {settings.steps} steps after {settings.warmup} to warm up."
    )
    if gradients:
        text += (
            f" Gradients of one fp32 batch, {gradients['matrices']} matrices: they differ from PEFT's by "
            f"at most {difference:.1e} of the largest in the same matrix, the loss by "
            f"{gradients['loss_difference']:.1e}."
        )
    return Chapter(
        "LoRA in both towers",
        text,
        (step_table(trained, OURS),) if trained else (),
        (
            at_least(f"both towers, step: {best}", 1.5, step_ratio(trained, OURS, best)),
            at_most(
                f"both towers, peak memory as a share of: {best}", 0.6, memory_ratio(trained, OURS, best)
            ),
            at_least(f"both towers, step: {PEFT_FP32}", 1.5, step_ratio(trained, OURS_FP32, PEFT_FP32)),
            at_most(
                f"both towers, peak memory as a share of: {PEFT_FP32}",
                0.6,
                memory_ratio(trained, OURS_FP32, PEFT_FP32),
            ),
            at_most("both towers, gradients differ from PEFT's by", 1e-5, difference, unit=""),
        ),
    )
