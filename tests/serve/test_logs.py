"""The request log: enough to find a request, and nothing of what it said."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from clipgraft.serve.logs import Observed, RequestLog, note_answer, note_error
from clipgraft.serve.messages import Encode, Text, With
from fake_service import FakeService


async def _embed(request: Request) -> PlainTextResponse:
    message = Encode((Text("a secret"), Text("xy")), With("vi"))
    note_answer(message, await asyncio.create_task(FakeService().answer(message)))
    return PlainTextResponse(request.scope["state"]["request_id"])


async def _refuse(request: Request) -> PlainTextResponse:
    note_error("overloaded")
    return PlainTextResponse("", 429)


async def _probe(request: Request) -> PlainTextResponse:
    return PlainTextResponse("", int(request.query_params["status"]))


async def _break(request: Request) -> PlainTextResponse:
    raise ZeroDivisionError


def ask(form: Any, *requests: tuple[str, str, dict[str, str]]) -> list[httpx.Response]:
    routes = [Route("/embed/{name}", _embed), Route("/refuse", _refuse), Route("/break", _break)]
    routes += [Route(path, _probe) for path in ("/ready", "/metrics", "/statistics")]
    app = Observed(Starlette(routes=routes), [RequestLog(form)])

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.request(method, path, headers=head) for method, path, head in requests]

    return asyncio.run(answers())


SECRET = {"Authorization": "Bearer secret", "X-Request-ID": "mine-1"}


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_has_what_happened_and_nothing_of_what_was_said(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that is sent on would give away keys and texts; or not tell which request was slow."""
    caplog.set_level(logging.INFO, "clipgraft.serve.requests")
    ask(
        form,
        ("GET", "/embed/secret?q=secret", SECRET),
        ("GET", "/refuse", {}),
        ("GET", "/break", {}),
        ("BREW", "/secret", {}),
    )
    lines = [entry.getMessage() for entry in caplog.records if entry.name == "clipgraft.serve.requests"]
    assert len(lines) == 4
    assert not any("secret" in line or "\n" in line for line in lines)
    if form == "text":
        assert " 200 GET /embed/{name} " in lines[0]
        assert lines[0].endswith(" items=2 tokens=10 adapter=vi id=mine-1")
        assert " error=overloaded id=" in lines[1]
        return
    told = [json.loads(line) for line in lines]
    kept = {name: told[0][name] for name in ("id", "route", "status", "items", "tokens", "adapter")}
    assert kept == {
        "id": "mine-1", "route": "/embed/{name}", "status": 200, "items": 2, "tokens": 10, "adapter": "vi"
    }  # fmt: skip
    assert (told[1]["status"], told[1]["error"]) == (429, "overloaded")
    assert told[2]["status"] == 500
    assert (told[3]["status"], told[3]["method"], told[3]["route"]) == (404, "OTHER", "(none)")


def test_ids_are_taken_over_where_they_are_sane() -> None:
    """A request could not be followed from a proxy to here; or a header could forge lines of the log."""
    good, forged, long = ask(
        "text",
        ("GET", "/embed/x", {"X-Request-ID": "a:b/1"}),
        ("GET", "/embed/x", {"X-Request-ID": "1 200 GET"}),
        ("GET", "/embed/x", {"X-Request-ID": "x" * 500}),
    )
    assert good.headers["X-Request-ID"] == good.text == "a:b/1"
    for made in (forged, long):
        assert made.headers["X-Request-ID"] == made.text
        assert len(made.text) == 32


def test_polls_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A probe every second would bury the requests of users; a refused one is a fault to be seen."""
    caplog.set_level(logging.INFO, "clipgraft.serve.requests")
    polls = [("/ready", 200), ("/ready", 503), ("/metrics", 200), ("/statistics", 200), ("/metrics", 401)]
    ask("text", *(("GET", f"{path}?status={status}", {}) for path, status in polls))
    ask("text", ("GET", "/refuse", {}))
    lines = [record.getMessage().split()[1:4] for record in caplog.records]
    assert lines == [["401", "GET", "/metrics"], ["429", "GET", "/refuse"]]
