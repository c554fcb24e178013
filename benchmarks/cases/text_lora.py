"""LoRA on the text tower with a frozen image tower, the guide's task, on ViT-B-32."""

from __future__ import annotations

from benchmarks.cases.training import (
    fastest,
    later_ratio,
    memory_ratio,
    run_ratio,
    times,
    training_table,
)
from benchmarks.measure import Contestant, Runs, peak
from benchmarks.report import Bars, Chapter, Goal, at_least, at_most
from benchmarks.settings import PEER_WORKERS, Settings

OURS, OURS_FP32 = "clipgraft, bf16", "clipgraft, fp32"
OURS_GALLERY = "clipgraft, bf16, all images as negatives"
GUIDE, GUIDE_BEST = "guide, default", "guide, bf16, cut at the longest of all"
PEFT, PEFT_AUTOCAST = "PEFT, fp32, padded to 77", "PEFT, bf16 autocast, padded to longest"
PEFT_EAGER, PEFT_BF16 = f"{PEFT_AUTOCAST}, eager attention", "PEFT, bf16 weights, padded to longest"
_PEFT_BEST = (PEFT_EAGER, PEFT_AUTOCAST, PEFT_BF16)
FULL, FULL_BF16 = "open_clip full fine-tuning, fp32", "open_clip full fine-tuning, amp_bf16"
_IN_QUICK = (OURS, GUIDE, PEFT, PEFT_EAGER)
_ONCE = (OURS_FP32, OURS_GALLERY, FULL, FULL_BF16)
_IN_UNIFORM = (OURS, GUIDE, PEFT, PEFT_EAGER, PEFT_BF16)


def contestants(settings: Settings) -> list[Contestant]:
    found = _contestants(settings, "natural")
    return [one for one in found if one.name in _IN_QUICK] if settings.quick else found


def uniform_contestants(settings: Settings) -> list[Contestant]:
    """List contestants for evenly spread caption lengths, in one round; the quick run leaves them out."""
    if settings.quick:
        return []
    return [one for one in _contestants(settings, "uniform", repeats=1) if one.name in _IN_UNIFORM]


def _contestants(settings: Settings, variant: str, repeats: int = 99) -> list[Contestant]:
    table = str(settings.data / f"{variant}.csv")
    ours = {
        "table": table,
        "targets": "text-attention",
        "batch_size": settings.batch_size,
        "epochs": settings.run_epochs,
    }
    # The default contrasts with all images of a frozen tower: another, better objective than the peers'.
    like_peers = {**ours, "fit": {"negatives": "batch"}}
    peer = {
        "table": table,
        "batch_size": settings.batch_size,
        "warmup": settings.warmup,
        "steps": settings.steps,
    }
    peft = {**peer, "targets": "text-attention", "workers": PEER_WORKERS}
    cut = {"autocast": True, "cut": True, "workers": PEER_WORKERS}
    longest = {"longest": True}
    # Which of the three is PEFT's best depends on the processor; the goals count the fastest.
    listed = [
        (OURS, "ours:train", {**like_peers, "autocast": True}),
        (OURS_GALLERY, "ours:train", {**ours, "autocast": True}),
        (OURS_FP32, "ours:train", like_peers),
        (PEFT_EAGER, "hf_peft:train", {**peft, **longest, "autocast": True, "attention": "eager"}),
        (PEFT_AUTOCAST, "hf_peft:train", {**peft, **longest, "autocast": True}),
        (PEFT_BF16, "hf_peft:train", {**peft, **longest, "bf16": True}),
        (PEFT, "hf_peft:train", peft),
        (GUIDE_BEST, "guide:train_text", {**peer, **cut}),
        (GUIDE, "guide:train_text", peer),
        (FULL_BF16, "openclip:train_full", {**peer, "autocast": True}),
        (FULL, "openclip:train_full", peer),
    ]
    return [
        Contestant(name, f"contestants.{function}", options, 1 if name in _ONCE else repeats)
        for name, function, options in listed
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    bars = {name: times(values, settings).run.median for name, values in runs.items()}
    memory = {name: peak(values) / 1e6 for name, values in runs.items()}
    return Chapter(
        "LoRA on the text tower, frozen image tower",
        _text(settings, "as people write them (median 16 tokens, few up to 40)"),
        (training_table(runs, settings, OURS),) if runs else (),
        goals(settings, runs),
        (
            Bars("text-lora-time.png", f"{settings.epochs} epochs from cold", "seconds", bars, True),
            Bars("text-lora-memory.png", "Peak memory while training", "MB", memory),
        ),
    )


def uniform_report(settings: Settings, runs: Runs) -> Chapter:
    return Chapter(
        "The same with captions of 12 to 40 tokens, evenly",
        "Every length equally often: the longest caption of nearly every batch has 40 tokens. One round.",
        (training_table(runs, settings, OURS),) if runs else (),
    )


def _text(settings: Settings, lengths: str) -> str:
    return (
        "r=16, alpha=16, dropout 0.1 on q, k, v and out of the 12 text blocks (786,432 weights), AdamW, "
        f"batches of {settings.batch_size}, {settings.images:,} JPEGs of 500x375 with one caption each, "
        f"captions {lengths}. Reading, decoding and resizing the images is part of every time. Ours runs "
        f"{settings.run_epochs} epochs from cold: the frozen image tower encodes each image once, in the "
        f"first epoch, with nothing on disk before. Peers run {settings.steps} steps after "
        f"{settings.warmup} to warm up; an epoch of theirs is {settings.steps_per_epoch} times the median "
        f"step, and every epoch of theirs costs the same. The ratios compare with '{OURS}', whose "
        "objective is the peers'; our default contrasts with all training images, and stands in a row of "
        "its own."
    )


def goals(settings: Settings, runs: Runs) -> tuple[Goal, ...]:
    best = fastest(runs, settings, _PEFT_BEST) or PEFT_EAGER
    wanted = ((best, 10.0), (PEFT, 25.0), (GUIDE, 50.0))
    return (
        *(
            at_least(
                f"text LoRA, {settings.epochs} epochs from cold: {peer}",
                n,
                run_ratio(runs, settings, OURS, peer),
            )
            for peer, n in wanted
        ),
        *(
            at_least(f"text LoRA, later epoch: {peer}", n, later_ratio(runs, settings, OURS, peer))
            for peer, n in wanted
        ),
        *(
            at_most(f"text LoRA, peak memory as a share of: {peer}", 1 / 3, memory_ratio(runs, OURS, peer))
            for peer, _ in wanted
        ),
    )
