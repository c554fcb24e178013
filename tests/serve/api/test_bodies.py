"""Bodies that are too large, too slow, or no JSON are refused, and hold up nobody else."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from clipgraft.serve.api import create_app
from clipgraft.serve.api.bodies import BoundedBodies
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend
from served_app import running

JSON = {"Content-Type": "application/json"}
LINES = (
    "POST /v1/embeddings HTTP/1.1",
    "Host: localhost",
    "Content-Type: application/json",
    "Content-Length: %d",
)
HEAD = "".join(f"{line}\r\n" for line in (*LINES, "")).encode()
GOOD = json.dumps({"model": "base", "input": "a"}).encode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve with a limit of 100 KB."""
    app = create_app(ScriptedBackend, WebArgs(max_body_mb=0.1))
    with running(app) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Return a client of that server."""
    with httpx.Client(base_url=address, timeout=60) as made:
        yield made


def refused(answer: httpx.Response, status: int) -> str:
    """Check the shape of a refusal; return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def raw(address: str, sent: bytes) -> bytes:
    """Send bytes as they are; return the first bytes of the answer."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(sent)
        return connection.recv(65536)


def test_announced_size(address: str) -> None:
    """A gigabyte would be read into memory before it is refused."""
    assert raw(address, HEAD % 10**9).startswith(b"HTTP/1.1 413")
    assert raw(address, HEAD % 10**30).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_body_in_pieces(client: httpx.Client) -> None:
    """The limit would be passed by a body that does not say its size."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50_000_000:
            sent += 10_000
            yield b"a" * 10_000

    try:
        answer = client.post("/v1/embeddings", content=endless(), headers=JSON)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the server closed the connection while more was sent
    else:
        assert "0.1 MB" in refused(answer, 413)
    assert sent < 50_000_000


def test_pieces_that_fit(client: httpx.Client) -> None:
    """A client that streams its body would be refused."""
    assert client.post("/v1/embeddings", content=iter([GOOD[:5], GOOD[5:]]), headers=JSON).status_code == 200


def test_compressed_body(client: httpx.Client) -> None:
    """A zip bomb of a kilobyte would become a gigabyte."""
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert "compressed" in refused(
        client.post("/v1/embeddings", content=gzip.compress(GOOD), headers=headers), 415
    )


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_other_kinds(client: httpx.Client, kind: str | None) -> None:
    """A page of a stranger could post to a server on this machine without the browser's asking it."""
    headers = {} if kind is None else {"Content-Type": kind}
    assert "application/json" in refused(client.post("/v1/embeddings", content=GOOD, headers=headers), 415)


def test_kinds_of_json(client: httpx.Client) -> None:
    """A client that says the character set would be refused."""
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        answer = client.post("/v1/embeddings", content=GOOD, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"a"',
        b"\xff\xfe",
        b'{"model": "base", "input": "a", "strength": NaN}',
        b'{"model": "base", "input": "a", "strength": Infinity}',
        b'{"model": "base", "input": "a", "strength": 1e999}',
        b'{"model": "base", "input": "\\ud800"}',
        b"[" * 50_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"model": "base", "input": ' + b"[" * 150 + b"]" * 150 + b"}",
        b"9" * 50_000,
        b'{"model": "base", "input": "a", "dimensions": ' + b"9" * 50_000 + b"}",
        GOOD + b"{}",
    ],
)
def test_no_json(client: httpx.Client, body: bytes) -> None:
    """A strange body would be a 500, or worse, be taken."""
    message = refused(client.post("/v1/embeddings", content=body, headers=JSON), 400)
    assert len(message) < 1100


def test_slow_body_ends(address: str) -> None:
    """A client that never ends its body would hold memory and a connection for ever."""
    backend = ScriptedBackend()
    app = create_app(lambda: backend, WebArgs())
    limited = BoundedBodies(app, most_bytes=1000, seconds=0.2)
    with running(limited) as url:
        assert raw(url, HEAD % 99 + b"{").startswith(b"HTTP/1.1 408")


def test_slow_clients_hold_up_nobody(address: str, client: httpx.Client) -> None:
    """A few clients on bad lines would be felt by everybody."""
    parts = urlsplit(address)
    slow = [socket.create_connection((parts.hostname, parts.port)) for _ in range(64)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall((HEAD % 99 + b"{")[: 40 + 2 * number])
        assert client.post("/v1/embeddings", content=GOOD, headers=JSON).status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_paths_and_methods(client: httpx.Client) -> None:
    """A mistyped address would be answered with something that no client of the dialect can read."""
    assert "/docs" in refused(client.get("/v1/embedding"), 404)
    answer = client.get("/v1/embeddings")
    assert "does not take GET" in refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert client.request("DELETE", "/search").status_code == 405
