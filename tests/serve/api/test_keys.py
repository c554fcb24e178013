"""Keys that requests must bring."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from clipgraft.errors import ConfigError
from clipgraft.serve.api import create_app, keys
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend
from served_app import running

ASKED = {"model": "base", "input": "a"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with two keys and a comment."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("# of the team\nfirst-key\n\n  second-key  \n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def address(key_file: Path) -> Iterator[str]:
    """Serve with keys of a file and of the environment, to pages of one origin."""
    os.environ[keys.ENVIRONMENT] = "from-environment, khoá-riêng"
    try:
        app = create_app(ScriptedBackend, WebArgs(api_keys=key_file, cors=("https://shop.example",)))
    finally:
        del os.environ[keys.ENVIRONMENT]
    with running(app) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Return a client of that server that brings no key."""
    with httpx.Client(base_url=address, timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"api-key": "first-key"},
        {"x-api-key": "from-environment"},
        {"x-api-key": "khoá-riêng".encode().decode("latin-1")},
    ],
)
def test_keys_are_taken(client: httpx.Client, headers: dict[str, str]) -> None:
    """A client would be refused though its key is right."""
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    assert client.post("/v1/embeddings", json=ASKED, headers=sent).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer first-key second-key"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"x-api-key": "# of the team"},
        {"x-api-key": "FIRST-KEY"},
        {"x-api-key": "first-ke"},
        {"x-api-key": ""},
    ],
)
def test_others_are_refused(client: httpx.Client, headers: dict[str, str]) -> None:
    """Anybody could use the server, or learn from the answer how near a guess came."""
    answer = client.post("/v1/embeddings", json=ASKED, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["error"]["type"] == "authentication_error"
    assert "first-key" not in answer.text


def test_every_route_but_probes_and_pages(client: httpx.Client) -> None:
    """A new route would be open to everybody because nobody thought of it."""
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 8
    open_ones = set()
    for path, operations in paths.items():
        for method in operations:
            filled = path.replace("{row}", "1").replace("{folder}", "a").replace("{model}", "a")
            if client.request(method, filled).status_code != 401:
                open_ones.add(path)
    assert open_ones == {"/health", "/ready"}
    for path in ("/nowhere", "//v1/models", "/health/../v1/models", "/page/%2e%2e/v1/models", "/metrics"):
        assert client.get(path).status_code in (401, 404)


def test_refused_before_the_body_is_read(client: httpx.Client) -> None:
    """Strangers could make the server read large bodies."""
    assert client.post("/v1/embeddings", content=b"x" * 1000).status_code == 401


def test_browsers_of_the_origin(client: httpx.Client) -> None:
    """The shop's page could not call the server, or any page could; an error would not be readable."""
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    ours, theirs = {"Origin": "https://shop.example"}, {"Origin": "https://other.example"}
    answer = client.options("/v1/embeddings", headers=ours | ask)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    assert client.options("/v1/embeddings", headers=theirs | ask).status_code == 400
    refusal = client.post("/v1/embeddings", json=ASKED, headers=ours)
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == "https://shop.example"
    assert (
        "access-control-allow-origin" not in client.post("/v1/embeddings", json=ASKED, headers=theirs).headers
    )


def test_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that was taken from somebody would be good until the next restart."""
    monkeypatch.setattr(keys, "_LOOK_AGAIN", 0.0)
    path = tmp_path / "keys.txt"
    path.write_text("old\n", encoding="utf-8")
    found = keys.Keys(path)
    assert found.accept(b"old")
    path.write_text("new key\n", encoding="utf-8")
    assert not found.accept(b"old")
    assert found.accept(b"new key")
    for damage in ("", "# nothing\n", None):
        caplog.clear()
        if damage is None:
            path.unlink()
        else:
            path.write_text(damage, encoding="utf-8")
        with caplog.at_level(logging.WARNING, "clipgraft.serve"):
            assert found.accept(b"new key")  # a slip of the editor must not lock everybody out
            assert not found.accept(b"")
        assert "stay what they were" in caplog.text
        assert "new key" not in caplog.text


def test_only_hashes_are_kept(key_file: Path) -> None:
    """A traceback or a dump of the process would show the keys."""
    found = keys.Keys(key_file, "from-environment")
    assert "key" not in repr(vars(found)).replace("keys", "").replace("key_file", "")
    assert hashlib.sha256(b"first-key").digest() in found._from_file


@pytest.mark.parametrize("content", [None, "", "# only this\n", b"\xff\xfe\x00"])
def test_file_that_cannot_be_used(tmp_path: Path, content: str | bytes | None) -> None:
    """A server that should ask for keys would start without any, open to all."""
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="api_keys"):
        create_app(ScriptedBackend, WebArgs(api_keys=path))
