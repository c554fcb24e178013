"""`python -m benchmarks.siglip`: LoRA steps of SigLIP-B/16 by clipgraft, beside transformers with PEFT.

Random weights of the size of google/siglip-base-patch16-224, r=16 on q, k, v and out, batches that lie in
memory, the sigmoid loss. Text alone: image features are known before, for all. Each contestant has a process
of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, run_contestant
from benchmarks.report import Table, machine, markdown_table

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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    parts = ["# SigLIP-B/16 beside transformers and PEFT", (__doc__ or "").split("\n\n", 1)[1].strip()]
    parts.append(machine({**describe(), "threads": args.threads}))
    for towers, rows in _ROWS.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in _WAYS}
        for _ in range(args.rounds):
            for name, function, options in _WAYS:
                given = {"towers": towers, "rows": rows, "warmup": 1, "steps": args.steps, **options}
                contestant = Contestant(name, f"contestants.siglip:{function}", given)
                found[name].append(run_contestant(contestant, args.threads))
                print(f"{towers}: {name}", file=sys.stderr, flush=True)
        parts += [f"## LoRA in {'the text tower' if towers == 'text' else 'both towers'}, batches of {rows}"]
        parts += [markdown_table(_table(found))]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")


def _table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """Seconds of a step, best and median of all rounds, and what they are of clipgraft's in the same type."""
    rows: list[tuple[str, ...]] = []
    seconds = {name: [s for run in runs for s in run["step_seconds"]] for name, runs in found.items()}
    memory = {name: max(run["peak_bytes"] for run in runs) for name, runs in found.items()}
    for name in found:
        own = f"{_OURS}, {'fp32' if 'fp32' in name else 'bf16'}"
        ratio = min(seconds[name]) / min(seconds[own])
        rows.append(
            (
                name,
                f"{min(seconds[name]):.2f}",
                f"{statistics.median(seconds[name]):.2f}",
                f"{ratio:.2f}",
                f"{memory[name] / 1e9:.2f}",
                f"{memory[own] / memory[name]:.2f}",
            )
        )
    header = ("", "s a step, best", "median", "times ours", "peak GB", "ours of it")
    return Table(header, tuple(rows))


if __name__ == "__main__":
    main()
