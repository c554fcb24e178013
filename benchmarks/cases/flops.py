"""Count operations with clipgraft, which needs no weights, and with calflops."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs, peak, spread
from benchmarks.report import Chapter, Table, megabytes, with_spread
from benchmarks.settings import Settings

_OURS, _LLAVA = "clipgraft", "clipgraft, LLaVA-NeXT-8B"


def contestants(settings: Settings) -> list[Contestant]:
    if settings.quick:
        return []
    return [
        Contestant(_OURS, "contestants.flops:by_clipgraft", repeats=3),
        Contestant("calflops", "contestants.flops:by_calflops", repeats=3),
        Contestant(_LLAVA, "contestants.flops:llava_by_clipgraft", repeats=3),
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    rows = tuple(
        (
            name,
            with_spread(spread([v["seconds"] for v in values])),
            megabytes(peak(values)),
            f"{values[0]['flops'] / 1e9:,.2f}",
            f"{values[0]['macs'] / 1e9:,.2f}",
            f"{values[0]['parameters'] / 1e6:,.2f}",
        )
        for name, values in runs.items()
    )
    return Chapter(
        "Counting operations",
        "ViT-B-32, one image and one caption of 77 tokens, from nothing to the numbers, imports included. "
        "calflops runs the model and misses attention; clipgraft needs no weights. LLaVA-NeXT-8B with an "
        "image of 480x640 and 64 tokens of text: calflops would need its 16.7 GB of weights.",
        (Table(("contestant", "seconds", "peak MB", "GFLOPs", "GMACs", "M parameters"), rows),),
    )
