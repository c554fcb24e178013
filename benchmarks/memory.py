"""Where the memory of a training run goes: `python -m benchmarks.memory`, megabytes by stage.

Every contestant runs in a process of its own, one after another, and reads `/proc/self` at the end of each
stage. `peak` is the largest resident set within the stage, the others are what is there at its end: `rss` as
the benchmarks count it, `pss` with shared pages divided among those who share them, `dirty` what the process
alone holds and cannot give back, `file` what is resident of files, torch's libraries included.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import peak_bytes
from benchmarks.measure import Contestant, ContestantError, Values, run_contestant
from benchmarks.settings import PEER_WORKERS, QUICK

_MAPS, _CLEAR = Path("/proc/self/smaps_rollup"), Path("/proc/self/clear_refs")
_FIELDS = {"Rss": "rss", "Pss": "pss", "Private_Dirty": "dirty", "Anonymous": "anonymous"}
_COLUMNS = ("peak", "rss", "pss", "dirty", "file")
_STEP_ROWS = (1, 2)  # steps that have a row of their own: the first makes what later ones use
_STAGES = (
    (re.compile(r"the image tower is frozen: each image is encoded once"), "before features"),
    (re.compile(r"training [\d,]+ of"), "attached"),
)

OURS, OURS_BOTH = "clipgraft, bf16, text", "clipgraft, bf16, both towers"
PEFT, PEFT_FP32 = "PEFT, bf16 autocast, text", "PEFT, fp32, padded to 77, text"
PEFT_BOTH, GUIDE = "PEFT, bf16 autocast, both towers", "guide, text"


class Meter:
    """What memory was at the end of each stage, and the largest within it.

    Attributes:
        rows: a dictionary of bytes a stage, under `stage` its name.
    """

    def __init__(self) -> None:
        self.rows: list[Values] = []

    def mark(self, stage: str) -> None:
        """End a stage."""
        found: Values = {"stage": stage, "peak": peak_bytes()}
        for line in _MAPS.read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            if name in _FIELDS:
                found[_FIELDS[name]] = int(value.split()[0]) * 1024
        found["file"] = found["rss"] - found.pop("anonymous")
        self.rows.append(found)
        _CLEAR.write_text("5")


class _Steps:
    """Marks the optimizer's first steps, and at the end all later ones together."""

    def __init__(self, meter: Meter) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._meter, self._done = meter, 0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        self._done += 1
        if self._done in _STEP_ROWS:
            self._meter.mark(f"step {self._done}")


class _Log(logging.Handler):
    """Marks what a run says it is about to do."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def emit(self, record: logging.LogRecord) -> None:
        for pattern, stage in _STAGES:
            if pattern.match(record.getMessage()):
                self._meter.mark(stage)


def ours(table: str, targets: str, batch_size: int, epochs: int, rows: int | None) -> Values:
    """Train as `contestants.ours` does, stage by stage."""
    meter = Meter()
    meter.mark("interpreter")
    import torch

    meter.mark("import torch")
    import clipgraft as cg
    from benchmarks.contestants.ours import load
    from benchmarks.prepare import LORA

    meter.mark("import clipgraft")
    clip = load()
    meter.mark("load")
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=0.1, targets=targets)
    pairs = cg.read_pairs(table, verify="header")
    if rows is not None:
        pairs = cg.Pairs(pairs.images[:rows], pairs.captions[:rows])
    meter.mark("adapter, table")
    logging.getLogger("clipgraft").addHandler(_Log(meter))
    _Steps(meter)
    train = cg.TrainArgs(
        batch_size=batch_size, epochs=epochs, lr_scheduler="const", warmup=0, negatives="batch"
    )
    with tempfile.TemporaryDirectory() as folder:
        run = cg.RunArgs(out=Path(folder) / "run", progress=False, save_frequency=0)
        cg.fit(clip, pairs, train=train, run=run, features=cg.FeatureArgs(autocast=True))
    meter.mark("later steps, saving")
    return {"stages": meter.rows}


def peft(
    table: str, targets: str, batch_size: int, steps: int, autocast: bool, longest: bool, attention: str
) -> Values:
    """Train as `contestants.hf_peft` does, stage by stage."""
    meter = Meter()
    meter.mark("interpreter")
    import torch

    meter.mark("import torch")
    from benchmarks.contestants import hf_peft
    from benchmarks.contestants.loop import adamw, timed_steps
    from benchmarks.data import read_table
    from benchmarks.prepare import DROPOUT, HF_BASE, adapter_folder

    model = hf_peft.load_model(HF_BASE, adapter_folder(targets, DROPOUT), bf16=False, attention=attention)
    meter.mark("load")
    _Steps(meter)
    batches = hf_peft.batches(
        HF_BASE,
        read_table(Path(table)),
        batch_size=batch_size,
        workers=PEER_WORKERS,
        longest=longest,
        bf16=False,
    )
    torch.manual_seed(0)
    timed_steps(
        batches,
        lambda batch: model(**batch, return_loss=True).loss,
        adamw(model),
        warmup=1,
        steps=steps - 1,
        autocast=autocast,
    )
    meter.mark("later steps, saving")
    return {"stages": meter.rows}


def contestants(batch_size: int, both_batch: int) -> list[Contestant]:
    """List the runs; all go over the same photographs."""
    table = {"table": str(QUICK.data / "natural.csv")}
    text = {**table, "targets": "text-attention", "batch_size": batch_size}
    both = {**table, "targets": "attention", "batch_size": both_batch}
    bf16 = {"steps": 4, "autocast": True, "longest": True, "attention": "eager"}
    fp32 = {"steps": 2, "autocast": False, "longest": False, "attention": "sdpa"}
    listed: list[tuple[str, str, dict[str, Any]]] = [
        (OURS, "memory:ours", {**text, "epochs": 2, "rows": None}),
        (PEFT, "memory:peft", {**text, **bf16}),
        (PEFT_FP32, "memory:peft", {**text, **fp32}),
        (OURS_BOTH, "memory:ours", {**both, "epochs": 1, "rows": 4 * both_batch}),
        (PEFT_BOTH, "memory:peft", {**both, **bf16}),
        (GUIDE, "contestants.guide:train_text", {**table, "batch_size": batch_size, "warmup": 1, "steps": 1}),
    ]
    return [Contestant(*one) for one in listed]


def table_of(name: str, values: Values) -> str:
    """Write one contestant's stages as a table of MB; one that has no stages as its peak alone."""
    stages = values.get("stages")
    if stages is None:
        return f"### {name}\n\npeak after loading {values['peak_bytes'] / 1e6:,.0f} MB\n"
    lines = [f"### {name}", "", f"| stage | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    lines += [
        f"| {row['stage']} | " + " | ".join(f"{row[c] / 1e6:,.0f}" for c in _COLUMNS) + " |" for row in stages
    ]
    return "\n".join([*lines, "", f"peak after loading {_peak(values) / 1e6:,.0f} MB", ""])


def _peak(values: Values) -> float:
    """The largest of all stages after loading, as `results` counts it."""
    stages = values.get("stages")
    if stages is None:
        return float(values["peak_bytes"])
    names = [row["stage"] for row in stages]
    return float(max(row["peak"] for row in stages[names.index("load") + 1 :]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the contestants and print a table of each; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of contestants, or parts of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--both-batch-size", type=int, default=32)
    arguments = parser.parse_args(argv)
    photos = {"photos": str(QUICK.data), "images": QUICK.images, "seed": QUICK.seed}
    run_contestant(Contestant("preparation", "prepare:prepare", photos), arguments.threads)
    failed = False
    for one in contestants(arguments.batch_size, arguments.both_batch_size):
        if arguments.only and not any(part in one.name for part in arguments.only):
            continue
        try:
            print(table_of(one.name, run_contestant(one, arguments.threads)), flush=True)
        except ContestantError as error:
            print(error, flush=True)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
