"""`python -m benchmarks.quality`: seconds until the recall that PEFT reaches after ten epochs.

The embedded base learns Vietnamese captions. PEFT has the same sites and rank as clipgraft's defaults, its
fastest flags (bf16 autocast, captions padded to the longest of the batch, eager attention), a cosine schedule
over its ten epochs, and the learning rate that turns out best of those tried by hand; the seconds that trying
took, and those of its evaluations, are not counted. clipgraft runs with its default settings, which choose
epochs and learning rate themselves; all that it does is counted: reading, encoding, trial steps, evaluations.

Both are measured on the same unseen scenes: the mean of R@1 in both directions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, run_contestant
from benchmarks.report import Table, machine, markdown_table

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_BATCH, _WARMUP, _LANGUAGE = 64, 50, "vi"
_RECALLS = ("image_to_text_R@1", "text_to_image_R@1")


@dataclass(frozen=True)
class Work:
    """What is learnt.

    Attributes:
        folder: of scenes and captions.
        scenes, test: how many to train on, of five captions each, and to measure on.
        epochs: of PEFT.
    """

    folder: str
    scenes: int
    test: int
    epochs: int

    def table(self, split: str) -> Path:
        return Path(self.folder) / f"{split}.{_LANGUAGE}.csv"


def prepare(**work: Any) -> dict[str, Any]:
    """Write scenes, captions, and the new adapter that PEFT starts from."""
    import torch

    import clipgraft as cg

    own = Work(**work)
    for split, size in (("train", own.scenes), ("test", own.test)):
        cg.emoji.write_scenes(Path(own.folder), split, size, [_LANGUAGE])
    clip = cg.load("emoji")
    torch.manual_seed(0)
    cg.apply_lora(clip, targets="text-matrices")
    cg.save_adapter(clip, Path(own.folder) / "adapter")
    return {"recall": _recall(clip, own)}


def by_peft(lr: float, **work: Any) -> dict[str, Any]:
    """Train with PEFT; returns seconds of training and recall after each epoch."""
    import clipgraft as cg
    from benchmarks.contestants.hf_peft import batches, load_model
    from benchmarks.contestants.loop import adamw, timed_steps
    from benchmarks.data import read_table
    from clipgraft.models.load import EMOJI_BASE
    from clipgraft.train.schedule import make_schedule

    own = Work(**work)
    model = load_model(EMOJI_BASE, Path(own.folder) / "adapter", bf16=False, attention="eager")
    rows = read_table(own.table("train"))
    steps = len(rows) // _BATCH
    data = iter(
        batches(EMOJI_BASE, rows, batch_size=_BATCH, workers=usable_cores(), longest=True, bf16=False)
    )
    schedule = make_schedule("cosine", lr, min(_WARMUP, own.epochs * steps // 10), own.epochs * steps)
    optimizer, seconds, recalls = adamw(model, lr, 0.1), [0.0], []
    for epoch in range(own.epochs):
        values = timed_steps(
            data,
            lambda batch: model(**batch, return_loss=True).loss,
            optimizer,
            warmup=0,
            steps=steps,
            autocast=True,
            schedule=lambda step, done=epoch * steps: schedule(done + step),  # type: ignore[misc]
        )
        seconds.append(seconds[-1] + sum(values["step_seconds"]))
        model.merge_adapter()
        clip = cg.load("emoji")
        clip.model = model.get_base_model().eval()
        recalls.append(_recall(clip, own))
        model.unmerge_adapter()
        model.train()
    return {"seconds": seconds[1:], "recall": recalls}


def by_clipgraft(**work: Any) -> dict[str, Any]:
    """Train with the default settings; returns seconds since the start and recall after each epoch."""
    import torch

    import clipgraft as cg
    from benchmarks.contestants.ours import log_clock

    own = Work(**work)
    started = time.perf_counter()
    clip = cg.load("emoji")
    torch.manual_seed(0)
    cg.apply_lora(clip, targets="text-matrices")
    pairs, val = (cg.read_pairs(own.table(split)) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder, log_clock(r"epoch [1-9]\d*: ") as clock:
        out = Path(folder) / "run"
        run = cg.RunArgs(out=out, progress=False, save_frequency=0, strength="none")
        result = cg.fit(clip, pairs, val, run=run, features=cg.FeatureArgs(autocast=True))
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    whole = time.perf_counter() - started
    measured = [event for event in events if event["kind"] == "val" and event["epoch"] > 0]
    seconds = [at - started for at in clock.times]
    recalls = [100 * sum(event[name] for name in _RECALLS) / 2 for event in measured]
    return {"seconds": seconds, "recall": recalls, "whole": whole, "best_epoch": result.best_epoch}


def _recall(clip: Any, work: Work) -> float:
    """The mean of R@1 in both directions, in percent."""
    import clipgraft as cg

    metrics = cg.evaluate_retrieval(clip, cg.read_pairs(work.table("test"), verify="header"))
    return float(100 * sum(metrics[name] for name in _RECALLS) / 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=1000, help="of five captions each")
    parser.add_argument("--test", type=int, default=500, help="scenes to measure on")
    parser.add_argument("--epochs", type=int, default=10, help="of PEFT")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="that PEFT tries")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = asdict(Work(folder, args.scenes, args.test, args.epochs))
        cores = usable_cores()
        base = run_contestant(Contestant("base", "quality:prepare", work), cores)["recall"]
        peft = {
            lr: run_contestant(Contestant(f"PEFT {lr:g}", "quality:by_peft", {"lr": lr, **work}), cores)
            for lr in args.rates
        }
        ours = run_contestant(Contestant("clipgraft", "quality:by_clipgraft", work), cores)
    text = page(args, base, peft, ours)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def page(args: argparse.Namespace, base: float, peft: dict[float, Any], ours: dict[str, Any]) -> str:
    """The results as Markdown."""
    best = max(peft, key=lambda lr: peft[lr]["recall"][-1])
    target, wanted = peft[best]["recall"][-1], peft[best]["seconds"][-1]
    reached = next((s for s, r in zip(ours["seconds"], ours["recall"], strict=True) if r >= target), None)
    told = (
        f"clipgraft reaches it after {reached:.1f} s: {wanted / reached:.1f} times as fast."
        if reached is not None
        else f"clipgraft does not reach it: its best is {max(ours['recall']):.1f} %."
    )
    rows = [
        (
            f"PEFT, learning rate {lr:g}",
            str(len(v["recall"])),
            f"{v['seconds'][-1]:.0f}",
            f"{v['recall'][-1]:.1f}",
        )
        for lr, v in peft.items()
    ]
    rows += [
        ("clipgraft, defaults", str(epoch), f"{s:.1f}", f"{r:.1f}")
        for epoch, (s, r) in enumerate(zip(ours["seconds"], ours["recall"], strict=True), start=1)
    ]
    header = ("", "epochs", "seconds", "R@1, mean of both directions, %")
    parts = [
        "# Time to quality",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        machine({**describe(), "threads": usable_cores()}),
        f"{args.scenes:,} scenes with five captions each, measured on {args.test:,} unseen ones; the base "
        f"untouched has {base:.1f} %. After {args.epochs} epochs PEFT's best has **{target:.1f} %**, which "
        f"took {wanted:.0f} s. **{told}** Its whole run takes {ours['whole']:.0f} s.",
        markdown_table(Table(header, tuple(rows))),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
