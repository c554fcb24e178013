"""Rows of several adapters in one batch. PEFT alone: ours joins when it is built."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs
from benchmarks.report import Chapter, Table, short
from benchmarks.settings import Settings

_TIMES = 5


def contestants(settings: Settings) -> list[Contestant]:
    """PEFT with 8 and 32 adapters; nobody in the quick run, where ours would have nothing to stand beside."""
    if settings.quick:
        return []
    return [
        Contestant(f"PEFT, {n} adapters", "contestants.mixed:by_peft", {"adapters": n, "times": _TIMES})
        for n in (8, 32)
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    rows = []
    for name, values in runs.items():
        base = min(second for v in values for second in v["base_seconds"])
        mixed = min(second for v in values for second in v["mixed_seconds"])
        rows.append((name, short(base), short(mixed), f"{base / mixed:.2f}x"))
    columns = ("contestant", "base alone, s", "mixed, s", "of the base's speed")
    return Chapter(
        "Rows of several adapters in one batch",
        "Text tower, 64 rows of 16 tokens, fp32, r=16 on attention. clipgraft: not built yet.",
        (Table(columns, tuple(rows)),),
    )
