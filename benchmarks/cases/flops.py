"""Counting operations. calflops alone: `clipgraft profile` joins when it is built."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs, best_and_median, peak
from benchmarks.report import Chapter, Table, megabytes, seconds
from benchmarks.settings import Settings


def contestants(settings: Settings) -> list[Contestant]:
    if settings.quick:
        return []
    return [Contestant("calflops", "contestants.flops:by_calflops", repeats=1)]


def report(settings: Settings, runs: Runs) -> Chapter:
    rows = tuple(
        (
            name,
            seconds(*best_and_median([v["seconds"] for v in values])),
            megabytes(peak(values)),
            f"{values[0]['flops'] / 1e9:.2f}",
            f"{values[0]['parameters'] / 1e6:.2f}",
        )
        for name, values in runs.items()
    )
    return Chapter(
        "Counting operations",
        "ViT-B-32, one image and one caption of 77 tokens. clipgraft: not built yet.",
        (Table(("contestant", "seconds", "peak MB", "GFLOPs", "M parameters"), rows),),
    )
