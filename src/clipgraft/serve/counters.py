"""Counters and histograms of a service, for `clipgraft.serve.messages.Statistics`."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_STARTS_AT_ZERO = (
    *("items_text", "items_image", "batches_text", "batches_image", "rejected", "expired", "cancelled"),
    *("adapter_hits", "adapter_loads", "adapter_evictions"),
)
_STAGES = ("prepare", "queue", "adapter", "compute")


class Histogram:
    """Observations by the upper bound of their bucket, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> dict[str, float]:
        """Counts by bucket, not cumulative, `inf` last, and `sum`."""
        names = [*(f"{bound:g}" for bound in self._bounds), "inf"]
        return {**dict(zip(names, self._counts, strict=True)), "sum": self._sum}


class Counters:
    """What was counted and measured since the start; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter(dict.fromkeys(_STARTS_AT_ZERO, 0))
        self._seconds = {stage: Histogram(SECONDS) for stage in _STAGES}
        self._rows = Histogram(ROWS)

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def observe(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage].observe(seconds)

    def observe_batch(self, rows: int) -> None:
        with self._lock:
            self._rows.observe(rows)

    def told(self) -> tuple[Mapping[str, int], Mapping[str, Mapping[str, float]], Mapping[str, float]]:
        """Counts, histograms of seconds by stage, and the histogram of rows in a batch."""
        with self._lock:
            seconds = {stage: histogram.told() for stage, histogram in self._seconds.items()}
            return dict(self._counts), seconds, self._rows.told()
