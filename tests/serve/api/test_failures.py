"""Errors of the model as answers: what to send again, when, and what was wrong."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from clipgraft.errors import (
    AdapterError,
    BusyError,
    ClipgraftError,
    ConfigError,
    ItemError,
    OverloadedError,
    UnavailableError,
    UnknownNameError,
    WriteError,
)
from clipgraft.serve.api import create_app
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend
from served_app import running

LINES = (
    "POST /v1/embeddings HTTP/1.1",
    "Host: localhost",
    "Content-Type: application/json",
    "Content-Length: %d",
)
HEAD = "".join(f"{line}\r\n" for line in (*LINES, "")).encode()
ASKED = {"model": "vi", "input": ["a", "b"]}


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    """A backend that fails as a test says."""
    return ScriptedBackend()


@pytest.fixture(scope="module")
def address(backend: ScriptedBackend) -> Iterator[str]:
    """Serve that backend."""
    with running(create_app(lambda: backend, WebArgs())) as url:
        yield url
    assert backend.closed


@pytest.fixture
def client(address: str, backend: ScriptedBackend) -> Iterator[httpx.Client]:
    """Return a client of that server; the backend answers again after each test."""
    with httpx.Client(base_url=address, timeout=60) as made:
        yield made
    backend.error, backend.hold, backend.state = None, 0.0, "ready"


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (OverloadedError("9 s are waiting", 4.2), 429, "overloaded", "5"),
        (UnavailableError("the model is starting", 0.1), 503, "unavailable", "1"),
        (UnknownNameError("no adapter 'vi'"), 404, "not_found", None),
        (ItemError(1, "no image"), 400, "invalid_item", None),
        (ConfigError("`where`: cannot be read"), 400, "invalid_request", None),
        (AdapterError("vi was made for another base"), 409, "adapter_unusable", None),
        (WriteError("cache: no room"), 503, "unavailable", "5"),
        (BusyError("another process writes"), 503, "unavailable", "5"),
        (ClipgraftError("something else"), 400, "invalid_request", None),
    ],
)
def test_errors_of_the_library(
    client: httpx.Client,
    backend: ScriptedBackend,
    error: ClipgraftError,
    status: int,
    code: str,
    retry: str | None,
) -> None:
    """A client would give up where it should come back, or come back where it cannot be helped."""
    backend.error = error
    answer = client.post("/v1/embeddings", json=ASKED)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers.get("retry-after") == retry
    if isinstance(error, ItemError):
        assert answer.json()["error"]["param"] == "input.1"


def test_fault_of_ours(
    client: httpx.Client, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody who reports a fault could not be told what it was, or would be shown our insides."""
    backend.error = RuntimeError("a secret of the inside")
    with caplog.at_level(logging.ERROR, "clipgraft.serve"):
        answer = client.post("/v1/embeddings", json=ASKED)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-request-id"] in caplog.text


def test_request_that_was_given_up(client: httpx.Client, backend: ScriptedBackend) -> None:
    """A model that ends while it has requests would answer them with faults of ours."""
    backend.error = asyncio.CancelledError()
    answer = client.post("/v1/embeddings", json=ASKED)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_long_names_are_cut(client: httpx.Client, backend: ScriptedBackend) -> None:
    """An error of a megabyte, or with control characters, would come back to whoever reads the log."""
    backend.error = ConfigError("x" * 10_000 + "\x1b[2J")
    message = client.post("/v1/embeddings", json=ASKED).json()["error"]["message"]
    assert len(message) <= 1001
    backend.error = ConfigError("\x1b[2J\nsecond line")
    message = client.post("/v1/embeddings", json=ASKED).json()["error"]["message"]
    assert "\x1b" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ("ready", 200, 200),
        ("starting", 200, 503),
        ("restarting", 200, 503),
        ("draining", 200, 503),
        ("failed", 503, 503),
    ],
)
def test_probes_follow_the_model(
    client: httpx.Client, backend: ScriptedBackend, state: str, health: int, ready: int
) -> None:
    """A balancer would send requests to a server whose model is gone, or restart one that only starts."""
    backend.state = state  # type: ignore[assignment]
    answers = client.get("/health"), client.get("/ready")
    assert [answer.status_code for answer in answers] == [health, ready]
    for answer in answers:
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1


def test_client_that_leaves(address: str, client: httpx.Client, backend: ScriptedBackend) -> None:
    """The model would go on computing for those who closed the page long ago."""
    backend.hold = 600
    backend.begun.clear()
    backend.cancelled.clear()
    parts = urlsplit(address)
    body = b'{"model":"base","input":"a"}'
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(HEAD % len(body) + body)
        assert backend.begun.wait(60)
        assert not backend.cancelled.is_set()
    assert backend.cancelled.wait(60)
    backend.hold = 0
    assert client.post("/v1/embeddings", json=ASKED).status_code == 200


def test_many_that_leave(address: str, backend: ScriptedBackend, client: httpx.Client) -> None:
    """Requests that nobody waits for would pile up until the server falls over."""
    backend.hold = 600
    for _ in range(10):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/embeddings", json=ASKED, timeout=0.05)
    backend.hold = 0
    assert client.post("/v1/embeddings", json=ASKED).status_code == 200
