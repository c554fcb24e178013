"""`python -m benchmarks.quality`: seconds until the recall that PEFT reaches after ten epochs.

Two subjects: the embedded base learns Vietnamese captions, and a ViT-B-32 of true size, random but for what
makes pictures differ (`learnable`), learns what coloured squares are called. PEFT has the same sites and rank
as clipgraft's defaults, its fastest flags (bf16 autocast, captions padded to the longest of the batch, eager
attention), a cosine schedule over its ten epochs, and the learning rate that turns out best of those tried by
hand; the seconds that trying took, and those of its evaluations, are not counted. clipgraft runs with its
default settings, which choose epochs and learning rate themselves; all that it does is counted: loading,
reading, encoding, trial steps, evaluations; only the import of torch is not, for either.

Both are measured on the same unseen pictures: the mean of R@1 in both directions.
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

EMOJI, SQUARES = "Vietnamese captions, the embedded base", "coloured squares, a ViT-B-32"
_BATCH, _WARMUP, _LANGUAGE = 64, 50, "vi"
_RECALLS = ("image_to_text_R@1", "text_to_image_R@1")


@dataclass(frozen=True)
class Work:
    """What is learnt.

    Attributes:
        subject: a key of `SUBJECTS`.
        folder: of pictures and captions.
        train, test: how many pictures to train on, each of several captions, and to measure on.
        epochs: of PEFT.
    """

    subject: str
    folder: str
    train: int
    test: int
    epochs: int

    def table(self, split: str) -> Path:
        return Path(self.folder) / (f"{split}.{_LANGUAGE}.csv" if self.subject == EMOJI else f"{split}.csv")

    @property
    def base(self) -> Path:
        """A folder of transformers that all contestants load."""
        from clipgraft.models.load import EMOJI_BASE

        return EMOJI_BASE if self.subject == EMOJI else Path(self.folder) / "base"


def prepare(**work: Any) -> dict[str, Any]:
    """Write pictures, captions, the base, and the new adapter that PEFT starts from."""
    import torch

    import clipgraft as cg

    own = Work(**work)
    if own.subject == EMOJI:
        for split, size in (("train", own.train), ("test", own.test)):
            cg.emoji.write_scenes(Path(own.folder), split, size, [_LANGUAGE])
    else:
        _prepare_squares(own)
    clip = cg.load(f"hf:{own.base}")
    torch.manual_seed(0)
    cg.apply_lora(clip, targets="text-matrices")
    cg.save_adapter(clip, Path(own.folder) / "adapter")
    return {"recall": _recall(clip, own)}


def _prepare_squares(work: Work) -> None:
    import torch

    import clipgraft as cg
    from benchmarks.learnable import DIRECTIONS, spread, write_squares
    from benchmarks.prepare import save_hf
    from clipgraft.pictures import open_image

    write_squares(Path(work.folder), {"train": work.train, "test": work.test})
    clip = cg.load("ViT-B-32", pretrained="none")
    images = cg.read_pairs(work.table("train"), verify="header").images[: 6 * DIRECTIONS]
    transform = clip.require_preprocess()
    spread(clip.model, torch.stack([transform(open_image(path)) for path in images]))
    save_hf(clip, work.base)


def by_peft(lr: float, **work: Any) -> dict[str, Any]:
    """Train with PEFT; returns seconds of training and recall after each epoch."""
    import clipgraft as cg
    from benchmarks.contestants.hf_peft import batches, load_model
    from benchmarks.contestants.loop import adamw, timed_steps
    from benchmarks.data import read_table
    from clipgraft.train.schedule import make_schedule

    own = Work(**work)
    model = load_model(own.base, Path(own.folder) / "adapter", bf16=False, attention="eager")
    rows = read_table(own.table("train"))
    steps = len(rows) // _BATCH
    data = iter(batches(own.base, rows, batch_size=_BATCH, workers=usable_cores(), longest=True, bf16=False))
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
        clip = cg.load(f"hf:{own.base}")
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
    clip = cg.load(f"hf:{own.base}")
    loaded = time.perf_counter()
    torch.manual_seed(0)
    cg.apply_lora(clip, targets="text-matrices")
    pairs, val = (cg.read_pairs(own.table(split)) for split in ("train", "test"))
    read = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, log_clock(r"epoch [1-9]\d*: ") as clock:
        out = Path(folder) / "run"
        run = cg.RunArgs(out=out, progress=False, save_frequency=0, strength="none")
        result = cg.fit(clip, pairs, val, run=run, features=cg.FeatureArgs(autocast=True))
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    whole = time.perf_counter() - started
    measured = [event for event in events if event["kind"] == "val" and event["epoch"] > 0]
    seconds = [at - started for at in clock.times]
    recalls = [100 * sum(event[name] for name in _RECALLS) / 2 for event in measured]
    stages = {"loading": loaded - started, "reading tables": read - loaded, **result.stages}
    rate = str(result.rate)
    return {"seconds": seconds, "recall": recalls, "whole": whole, "stages": stages, "rate": rate}


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
    parser.add_argument("--scenes", type=int, default=400, help="of five captions each, to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes to measure on")
    parser.add_argument("--squares", type=int, default=228, help="of four captions each; 0 leaves them out")
    parser.add_argument("--test-squares", type=int, default=100, help="to measure on")
    parser.add_argument("--epochs", type=int, default=10, help="of PEFT")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3], help="that PEFT tries")
    parser.add_argument(
        "--rates-squares", type=float, nargs="+", default=[1e-3], help="that PEFT tries on the squares"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    subjects = [(EMOJI, args.scenes, args.test, args.rates)]
    if args.squares:
        subjects.append((SQUARES, args.squares, args.test_squares, args.rates_squares))
    parts = [
        "# Time to quality",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        machine({**describe(), "threads": usable_cores()}),
    ]
    for subject, train, test, rates in subjects:
        with tempfile.TemporaryDirectory() as folder:
            work = Work(subject, folder, train, test, args.epochs)
            parts.append(chapter(work, *_run(work, rates)))
        print(parts[-1], flush=True)
    text = "\n\n".join(parts) + "\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def _run(work: Work, rates: Sequence[float]) -> tuple[float, dict[float, Any], dict[str, Any]]:
    """The base's recall, and what each of PEFT's rates and clipgraft came to; each in its own process."""
    values, cores = asdict(work), usable_cores()
    base = run_contestant(Contestant("base", "quality:prepare", values), cores)["recall"]
    peft = {
        lr: run_contestant(Contestant(f"PEFT {lr:g}", "quality:by_peft", {"lr": lr, **values}), cores)
        for lr in rates
    }
    return base, peft, run_contestant(Contestant("clipgraft", "quality:by_clipgraft", values), cores)


def chapter(work: Work, base: float, peft: dict[float, Any], ours: dict[str, Any]) -> str:
    """The results of one subject as Markdown."""
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
            f"{v['seconds'][-1]:.1f}",
            f"{v['recall'][-1]:.1f}",
        )
        for lr, v in peft.items()
    ]
    rows += [
        ("clipgraft, defaults", str(epoch), f"{s:.1f}", f"{r:.1f}")
        for epoch, (s, r) in enumerate(zip(ours["seconds"], ours["recall"], strict=True), start=1)
    ]
    header = ("", "epochs", "seconds", "R@1, mean of both directions, %")
    stages = tuple((name, f"{seconds:.1f}") for name, seconds in ours["stages"].items())
    return "\n\n".join(
        [
            f"## {work.subject[0].upper()}{work.subject[1:]}",
            f"{work.train:,} pictures, measured on {work.test:,} unseen ones; the base untouched has "
            f"{base:.1f} %. After {work.epochs} epochs PEFT's best has **{target:.1f} %**, which took "
            f"{wanted:.0f} s. "
            f"**{told}** Its whole run takes {ours['whole']:.0f} s.",
            markdown_table(Table(header, tuple(rows))),
            f"Where the seconds of clipgraft's whole run go ({ours['rate']}):",
            markdown_table(Table(("", "seconds"), stages)),
        ]
    )


if __name__ == "__main__":
    main()
