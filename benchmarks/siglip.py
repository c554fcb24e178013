"""`python -m benchmarks.siglip`: LoRA steps of SigLIP-B/16 by clipgraft, beside transformers with PEFT.

Random weights of the size of google/siglip-base-patch16-224, r=16 on q, k, v and out, batches that lie in
memory, the sigmoid loss. Text alone: image features are known before, for all. Each contestant has a process
of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, Runs, measure, peak, run_contestant, spread
from benchmarks.noise import Watch, noise
from benchmarks.probe import Probe
from benchmarks.report import Table, machine, markdown_table, with_spread

_OURS = "clipgraft"
_WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (f"{_OURS}, bf16", "ours", {"bf16": True}),
    ("PEFT, bf16 autocast", "peft", {"bf16": "autocast"}),
    ("PEFT, bf16 weights", "peft", {"bf16": "weights"}),
    (f"{_OURS}, fp32", "ours", {"bf16": False}),
    ("PEFT, fp32", "peft", {}),
)
_ROWS = {"text": 32, "both": 16}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.siglip", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--retries", type=int, default=2, help="of a measurement that the machine disturbed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    parts = ["# SigLIP-B/16 beside transformers and PEFT", (__doc__ or "").split("\n\n", 1)[1].strip()]
    parts.append(machine({**describe(), "threads": args.threads}))
    with Probe(args.threads) as probe:
        watch = Watch(probe, args.retries, _tell)
        run = functools.partial(run_contestant, threads=args.threads)
        for towers, rows in _ROWS.items():
            _tell(towers)
            options = {"towers": towers, "rows": rows, "warmup": 1, "steps": args.steps}
            contestants = [
                Contestant(name, f"contestants.siglip:{function}", {**options, **own})
                for name, function, own in _WAYS
            ]
            found, failures = measure(contestants, args.rounds, run, watch, _tell)
            where = "the text tower" if towers == "text" else "both towers"
            parts += [f"## LoRA in {where}, batches of {rows}", markdown_table(_table(found))]
            parts += [f"Did not run: {line}" for line in failures]
    parts.insert(3, noise(watch.seen))
    page = "\n\n".join(parts) + "\n"
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")


def _table(found: Runs) -> Table:
    """Seconds of a step over all rounds, and what they are of clipgraft's in the same type."""
    rows: list[tuple[str, ...]] = []
    seconds = {name: spread([s for run in runs for s in run["step_seconds"]]) for name, runs in found.items()}
    memory = {name: peak(runs) for name, runs in found.items()}
    for name in found:
        own = f"{_OURS}, {'fp32' if 'fp32' in name else 'bf16'}"
        there = own in found
        rows.append(
            (
                name,
                with_spread(seconds[name]),
                f"{seconds[name].median / seconds[own].median:.2f}" if there else "",
                f"{memory[name] / 1e9:.2f}",
                f"{memory[own] / memory[name]:.2f}" if there else "",
            )
        )
    header = ("", "s a step, median (lowest to highest)", "times ours", "peak GB", "ours of it")
    return Table(header, tuple(rows))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
