"""Decide by the machine's own speed whether a measurement counts, and say how noisy a run was.

Each measurement has a probe before and one after it. Where the two differ by more than a tenth, something
else had the machine meanwhile, and the measurement is made again, a bounded number of times. What is kept is
the attempt during which the speed moved least. All that is decided is in the record, so that a page can be
made again from it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from benchmarks.probe import Speeds

LIMIT = 0.1
"""A share of the speed; a measurement during which it moved by more is disturbed."""

Seen: TypeAlias = dict[str, Any]
"""One measurement: `name`, and `tries`, the speeds before and after each attempt."""

T = TypeVar("T")


class Watch:
    """Runs measurements between two probes of the machine's speed.

    Attributes:
        seen: every measurement so far, plain values for a file.
    """

    def __init__(self, probe: Callable[[], Speeds], retries: int, tell: Callable[[str], None]) -> None:
        self.seen: list[Seen] = []
        self._probe, self._retries, self._tell = probe, retries, tell

    def run(self, name: str, measure: Callable[[], T]) -> T:
        """Return what `measure` returns in its least disturbed attempt; what it raises goes through."""
        kept: list[tuple[float, T]] = []
        tries: list[list[Speeds]] = []
        while not kept or (kept[-1][0] > LIMIT and len(kept) <= self._retries):
            before = self._probe()
            found = measure()
            tries.append([before, self._probe()])
            kept.append((moved(tries[-1]), found))
            if kept[-1][0] > LIMIT:
                self._tell(f"  {name}: the machine's speed moved by {kept[-1][0]:.0%} meanwhile")
        self.seen.append({"name": name, "tries": tries})
        return min(kept, key=lambda attempt: attempt[0])[1]


def moved(speeds: Sequence[Speeds]) -> float:
    """Return by how much the speed of a type went up or down at most, as a share of its highest."""
    lows_and_highs = (
        (min(each[name] for each in speeds), max(each[name] for each in speeds)) for name in speeds[0]
    )
    return max(1 - low / high for low, high in lows_and_highs)


def noise(seen: Sequence[Seen]) -> str:
    """Describe how noisy a run was, one paragraph; empty where nothing was watched."""
    if not seen:
        return ""
    probes = [speeds for one in seen for attempt in one["tries"] for speeds in attempt]
    moves = [min(moved(attempt) for attempt in one["tries"]) for one in seen]
    repeated = [one["name"] for one in seen if len(one["tries"]) > 1]
    disturbed = [one["name"] for one, move in zip(seen, moves, strict=True) if move > LIMIT]
    words = [
        f"A matmul before and after each of {len(seen)} measurements ran at {_range(probes)} "
        f"(median; lowest to highest): over the whole run the machine's speed moved by {moved(probes):.0%}. "
        f"While one measurement ran it moved by {statistics.median(moves):.0%} (median).",
        f"{len(repeated)} were repeated because it moved by more than {LIMIT:.0%}{_names(repeated)}.",
        f"{len(disturbed)} stayed disturbed{_names(disturbed)}.",
    ]
    return " ".join(words)


def _range(probes: Sequence[Speeds]) -> str:
    parts = []
    for name in probes[0]:
        found = [each[name] for each in probes]
        parts.append(
            f"{statistics.median(found):.0f} GFLOP/s in {name} ({min(found):.0f} to {max(found):.0f})"
        )
    return " and ".join(parts)


def _names(names: Sequence[str]) -> str:
    if not names:
        return ""
    counted = (name if times == 1 else f"{name} ({times} times)" for name, times in Counter(names).items())
    return ": " + "; ".join(counted)
