"""`/metrics`: what Prometheus reads of a server, checked by Prometheus' own parser."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clipgraft.errors import UnavailableError
from clipgraft.serve.logs import RequestRecord
from clipgraft.serve.messages import Encode, Message, Text
from clipgraft.serve.metrics import FAMILIES, Metrics
from fake_service import FakeService


def parsed(text: bytes) -> dict[str, Any]:
    parser = pytest.importorskip("prometheus_client.parser")
    return {family.name: family for family in parser.text_string_to_metric_families(text.decode())}


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    found = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return float(found[0])


def record(status: int = 200, seconds: float = 0.003, error: str | None = None) -> RequestRecord:
    return RequestRecord("1", "POST", "/v1/embeddings", status, seconds, error=error)


def test_what_was_counted_is_told() -> None:
    """An operator would see no load, no errors, or a histogram that Prometheus cannot use."""

    async def told() -> bytes:
        metrics, service = Metrics(), FakeService()
        for one in (record(), record(seconds=0.3), record(429, error="overloaded"), record(404)):
            metrics.begun()
            metrics.ended(one)
        metrics.begun()
        await service.answer(Encode((Text("abc"), Text("de"))))
        return await metrics.tell(service)

    families = parsed(asyncio.run(told()))
    assert set(families) == set(FAMILIES)
    assert value(families, "clipgraft_requests_total", status="200", route="/v1/embeddings", process="0") == 2
    assert value(families, "clipgraft_errors_total", code="overloaded") == 1
    assert value(families, "clipgraft_errors_total", code="404") == 1
    assert value(families, "clipgraft_request_seconds_bucket", le="0.0025") == 0
    assert value(families, "clipgraft_request_seconds_bucket", le="0.005") == 3
    assert value(families, "clipgraft_request_seconds_bucket", le="+Inf") == 4
    assert value(families, "clipgraft_request_seconds_sum") == pytest.approx(0.309)
    assert value(families, "clipgraft_requests_in_flight") == 1
    assert value(families, "clipgraft_items_total", kind="text") == 2
    assert value(families, "clipgraft_stage_seconds_count", stage="compute") == 4
    assert value(families, "clipgraft_batch_rows_sum") == 7
    assert value(families, "clipgraft_ready") == 1


def test_any_process_tells_for_all(tmp_path: Path) -> None:
    """Each scrape would show another process's counters, which then seem to fall."""

    async def told() -> tuple[bytes, bytes]:
        both = [Metrics(number, tmp_path) for number in (0, 1)]
        for number, metrics in enumerate(both):
            for _ in range(number + 1):
                metrics.begun()
                metrics.ended(record())
            await metrics.publish(FakeService())
        (tmp_path / "2.json").write_text('{"half')
        return await both[0].tell(FakeService()), await both[1].tell(FakeService())

    for text in asyncio.run(told()):
        families = parsed(text)
        assert value(families, "clipgraft_requests_total", process="0") == 1
        assert value(families, "clipgraft_requests_total", process="1") == 2


def test_a_model_that_is_away_costs_no_scrape() -> None:
    """Just when a model was lost nothing would be seen of it."""

    class Away(FakeService):
        async def answer(self, message: Message[Any], *, timeout: float | None = None) -> Any:
            raise UnavailableError("the model is restarting")

    families = parsed(asyncio.run(Metrics().tell(Away("restarting"))))
    assert value(families, "clipgraft_ready") == 0
    assert not families["clipgraft_items"].samples
