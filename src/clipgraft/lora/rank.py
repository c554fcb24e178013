"""A rank for who does not want to choose one, from how much there is to learn from and what for."""

from __future__ import annotations

import bisect
from typing import Literal

Task = Literal["classification", "retrieval"]
_SIZES = (10_000, 50_000, 100_000)
_RANKS: dict[Task, tuple[int, ...]] = {"classification": (4, 8, 16, 32), "retrieval": (8, 16, 32, 64)}


def auto_rank(samples: int, task: Task) -> tuple[int, str]:
    """The rank for a number of training pairs, and the reason in words.

    Retrieval gets 8, 16, 32 or 64 below 10,000, below 50,000, up to 100,000 and beyond; telling a few classes
    apart takes half of that. Both stay within what is commonly advised for these sizes.
    """
    place = bisect.bisect_right(_SIZES, samples)
    bounds = ("fewer than 10,000", "10,000 to 50,000", "50,000 to 100,000", "100,000 or more")
    rank = _RANKS[task][place]
    return rank, f"r={rank} for {task} with {samples:,} pairs ({bounds[place]})"
