"""Recall and ranks over large galleries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.measure import Contestant, Runs, Values, peak, spread
from benchmarks.report import Chapter, Goal, Table, at_least, at_most, megabytes, short, with_spread
from benchmarks.settings import Settings

OPEN_CLIP, OURS_ONE = "open_clip, one caption an image", "clipgraft, one caption an image"
CLIP_BENCHMARK, OURS_FIVE = "CLIP_benchmark, five captions an image", "clipgraft, five captions an image"
OURS_LARGE = "clipgraft, five captions an image, distractors"
_FIVE = 5
_LIMIT_GB = 1.0


def contestants(settings: Settings) -> list[Contestant]:
    rows = settings.retrieval_rows
    one = {"rows": rows, "images": rows, "captions_an_image": 1, "seed": settings.seed}
    five = {**one, "images": rows // _FIVE, "captions_an_image": _FIVE}
    found = [
        Contestant(OURS_ONE, "contestants.ours:retrieval", one),
        Contestant(OPEN_CLIP, "contestants.retrieval:by_open_clip", one, repeats=1),
        Contestant(OURS_FIVE, "contestants.ours:retrieval", five),
        Contestant(CLIP_BENCHMARK, "contestants.retrieval:by_clip_benchmark", five, repeats=1),
    ]
    if settings.retrieval_large:
        large = {**five, "rows": settings.retrieval_large, "images": settings.retrieval_large}
        found.append(Contestant(OURS_LARGE, "contestants.ours:retrieval", large, repeats=1))
    return found


def report(settings: Settings, runs: Runs) -> Chapter:
    n = settings.retrieval_rows
    sizes = {OURS_FIVE: (n, n // _FIVE), CLIP_BENCHMARK: (n, n // _FIVE)}
    sizes[OURS_LARGE] = (settings.retrieval_large, settings.retrieval_large)
    rows = []
    for name, values in runs.items():
        captions, images = sizes.get(name, (n, n))
        rows.append(
            (
                name,
                f"{captions:,} x {images:,}",
                with_spread(spread([v["seconds"] for v in values])),
                megabytes(peak(values)),
                *(_recall(values[0], key) for key in ("image_retrieval_recall@1", "text_retrieval_recall@1")),
            )
        )
    columns = ("contestant", "captions x images", "seconds", "peak MB", "T->I R@1, %", "I->T R@1, %")
    return Chapter(
        "Recall at scale",
        "Features of width 512, made up so that recall is far from 0 and 100 %. Peak memory is of the "
        "whole process, torch and the features included. open_clip and CLIP_benchmark build the whole "
        "matrix, so they run at the size that fits. Agreement below is over every number that both "
        "report.",
        (Table(columns, tuple(rows)),),
        goals(runs),
    )


def goals(runs: Runs) -> tuple[Goal, ...]:
    large = peak(runs[OURS_LARGE]) / 1e9 if OURS_LARGE in runs else None
    found = [at_most("recall at 100k x 100k, peak memory", _LIMIT_GB, large, unit=" GB")]
    for ours, peer in ((OURS_ONE, OPEN_CLIP), (OURS_FIVE, CLIP_BENCHMARK)):
        ratio = disagreement = None
        if ours in runs and peer in runs:
            ratio = _taken(runs[peer]) / _taken(runs[ours])
            disagreement = largest_difference(runs[ours][0], runs[peer][0])
        found.append(at_least(f"recall, speed: {peer}", 1, ratio))
        found.append(at_most(f"recall, values differ from: {peer}", 1e-6, disagreement, unit=""))
    return tuple(found)


def largest_difference(ours: Values, peer: Values) -> float:
    """Return the largest difference over all shared metrics, relative for values above 1."""
    names = ours["metrics"].keys() & peer["metrics"].keys()
    if not names:
        return math.nan
    pairs = [(ours["metrics"][name], peer["metrics"][name]) for name in names]
    return float(max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs))


def _taken(runs: Sequence[Values]) -> float:
    return spread([values["seconds"] for values in runs]).median


def _recall(values: Values, key: str) -> str:
    """Pick recalls by CLIP_benchmark's names."""
    other = {"image_retrieval_recall@1": "text_to_image_R@1", "text_retrieval_recall@1": "image_to_text_R@1"}
    metrics = values["metrics"]
    return short(100 * metrics.get(key, metrics.get(other[key])))
