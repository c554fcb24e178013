"""What a server did, for Prometheus: of its requests, and of its model.

Each process of a server counts for itself. Where several share a port, each writes what it counted to a
common folder every second, and whichever is asked tells it for all, one series for each `process`: so no
counter ever falls because another process was asked.
"""

from __future__ import annotations

import bisect
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from clipgraft.errors import ClipgraftError
from clipgraft.serve.logs import RequestRecord
from clipgraft.serve.messages import Backend, Statistics, Stats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PATIENCE = 2.0
"""Seconds that the model has to tell its counters; without them a scrape has those of the requests."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
Buckets: TypeAlias = Mapping[str, float]
"""Observations by the upper bound of their bucket, not cumulative, `inf` last, with their `sum`."""
Series: TypeAlias = tuple[tuple[str, ...], "float | Buckets"]
Snapshot: TypeAlias = dict[str, list[Series]]
"""The series of each family of `FAMILIES`: values of its labels, and what was counted."""


@dataclass(frozen=True)
class Family:
    """A metric as Prometheus knows it, without the label `process` that each has."""

    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()


FAMILIES = {
    "clipgraft_requests": Family("counter", "Requests answered.", ("route", "method", "status")),
    "clipgraft_request_seconds": Family(
        "histogram", "Seconds from the first line of a request to the last byte of its answer.", ("route",)
    ),
    "clipgraft_errors": Family("counter", "Errors answered, by their code.", ("code",)),
    "clipgraft_requests_in_flight": Family("gauge", "Requests that are being answered."),
    "clipgraft_ready": Family("gauge", "1 while the model answers, else 0."),
    "clipgraft_model_restarts": Family("counter", "Starts of the model's process in place of a lost one."),
    "clipgraft_items": Family("counter", "Texts and images encoded.", ("kind",)),
    "clipgraft_batches": Family("counter", "Batches computed.", ("kind",)),
    "clipgraft_batch_rows": Family("histogram", "Texts or images of a batch."),
    "clipgraft_stage_seconds": Family(
        "histogram",
        "Seconds of a request in the model's process: prepare (tokenise, decode), queue, adapter (wait for "
        "one that is read), compute.",
        ("stage",),
    ),
    "clipgraft_queue_items": Family("gauge", "Texts and images that wait.", ("kind",)),
    "clipgraft_queue_seconds": Family("gauge", "Estimated seconds until what waits is computed."),
    "clipgraft_adapter_hits": Family("counter", "Uses of an adapter that was in memory."),
    "clipgraft_adapter_loads": Family("counter", "Adapters read into memory."),
    "clipgraft_adapter_evictions": Family("counter", "Adapters that left memory for others."),
    "clipgraft_adapters_loaded": Family("gauge", "Adapters in memory."),
    "clipgraft_adapter_bytes": Family("gauge", "Bytes of adapters in memory."),
    "clipgraft_rejected": Family("counter", "Requests refused because too much was waiting (429)."),
    "clipgraft_expired": Family("counter", "Requests that could not be begun in time (503)."),
    "clipgraft_cancelled": Family("counter", "Requests withdrawn because their client left."),
    "clipgraft_model_resident_bytes": Family("gauge", "Memory of the model's process."),
}
"""Every metric that `/metrics` has; counters end in `_total` there, as Prometheus wants."""

_COUNTS = {
    "items_text": ("clipgraft_items", "text"),
    "items_image": ("clipgraft_items", "image"),
    "batches_text": ("clipgraft_batches", "text"),
    "batches_image": ("clipgraft_batches", "image"),
    "adapter_hits": ("clipgraft_adapter_hits",),
    "adapter_loads": ("clipgraft_adapter_loads",),
    "adapter_evictions": ("clipgraft_adapter_evictions",),
    "rejected": ("clipgraft_rejected",),
    "expired": ("clipgraft_expired",),
    "cancelled": ("clipgraft_cancelled",),
}
_GAUGES = {
    "queue_text": ("clipgraft_queue_items", "text"),
    "queue_image": ("clipgraft_queue_items", "image"),
    "queue_seconds": ("clipgraft_queue_seconds",),
    "adapters_loaded": ("clipgraft_adapters_loaded",),
    "adapter_bytes": ("clipgraft_adapter_bytes",),
    "rss_bytes": ("clipgraft_model_resident_bytes",),
}


@dataclass
class _Times:
    """A histogram of seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    @property
    def buckets(self) -> dict[str, float]:
        names = [*(f"{bound:g}" for bound in SECONDS), "inf"]
        return {**dict(zip(names, self.counts, strict=True)), "sum": self.sum}


class Metrics:
    """Counts the requests of this process, and tells what all processes of the server counted.

    Takes the records of `clipgraft.serve.logs.Observed`; all in one event loop.
    """

    def __init__(self, process: int = 0, shared: Path | None = None) -> None:
        """Count for one process of a server.

        Args:
            process: its number.
            shared: the folder in which the processes of the server find each other's counts; None for one
                alone.
        """
        self._process = process
        self._shared = shared
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._times: dict[str, _Times] = {}
        self._in_flight = 0

    def begun(self) -> None:
        """Count a request that has come."""
        self._in_flight += 1

    def ended(self, record: RequestRecord) -> None:
        """Count a request that was answered."""
        self._in_flight -= 1
        self._requests[record.route, record.method, str(record.status)] += 1
        self._times.setdefault(record.route, _Times()).observe(record.seconds)
        if record.error is not None or record.status >= 400:
            self._errors[record.error or str(record.status)] += 1

    async def tell(self, backend: Backend) -> bytes:
        """Write what was counted as Prometheus reads it (`CONTENT_TYPE`)."""
        own = await self.snapshot(backend)
        return exposition({**self._others(), self._process: own})

    async def publish(self, backend: Backend) -> None:
        """Write what this process counted to the common folder, for the others to tell."""
        if self._shared is None:
            return
        place = self._shared / f"{self._process}.json"
        beside = place.with_suffix(".next")
        with contextlib.suppress(OSError):  # a full disk costs the figures of others, nothing else
            beside.write_text(json.dumps(await self.snapshot(backend)), encoding="utf-8")
            beside.replace(place)

    async def snapshot(self, backend: Backend) -> Snapshot:
        """Return what this process and its model counted."""
        found: Snapshot = {
            "clipgraft_requests": list(self._requests.items()),
            "clipgraft_request_seconds": [((route,), times.buckets) for route, times in self._times.items()],
            "clipgraft_errors": [((code,), count) for code, count in self._errors.items()],
            "clipgraft_requests_in_flight": [((), self._in_flight)],
            "clipgraft_ready": [((), float(backend.state == "ready"))],
            "clipgraft_model_restarts": [((), getattr(backend, "restarts", 0))],
        }
        with contextlib.suppress(ClipgraftError):
            told = await backend.answer(Stats(), timeout=PATIENCE)
            for name, series in _of_model(told):
                found.setdefault(name, []).append(series)
        return found

    def _others(self) -> dict[int, Snapshot]:
        found: dict[int, Snapshot] = {}
        for path in sorted(self._shared.glob("*.json")) if self._shared is not None else ():
            with contextlib.suppress(OSError, ValueError):
                found[int(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _of_model(told: Statistics) -> Iterator[tuple[str, Series]]:
    for table, values in ((_COUNTS, told.counts), (_GAUGES, told.gauges)):
        for key, (name, *labels) in table.items():
            if key in values:
                yield name, (tuple(labels), values[key])
    for stage, buckets in told.seconds.items():
        yield "clipgraft_stage_seconds", ((stage,), buckets)
    yield "clipgraft_batch_rows", ((), told.batch_sizes)


def exposition(snapshots: Mapping[int, Snapshot]) -> bytes:
    """Write the snapshots of processes, by their numbers, in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from _families(snapshots)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    text: bytes = generate_latest(registry)
    return text


def _families(snapshots: Mapping[int, Snapshot]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    for name, family in FAMILIES.items():
        metric = kinds[family.kind](name, family.about, labels=(*family.labels, "process"))
        for process, snapshot in sorted(snapshots.items()):
            for labels, value in snapshot.get(name, ()):
                where = [*labels, str(process)]
                if isinstance(value, Mapping):
                    metric.add_metric(where, _cumulative(value), value.get("sum", 0.0))
                else:
                    metric.add_metric(where, value)
        yield metric


def _cumulative(buckets: Buckets) -> Sequence[tuple[str, float]]:
    rows, total = [], 0.0
    for bound in sorted((name for name in buckets if name != "sum"), key=float):
        total += buckets[bound]
        rows.append(("+Inf" if bound == "inf" else f"{float(bound)}", total))
    return rows
