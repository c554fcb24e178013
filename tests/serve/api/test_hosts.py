"""Names of hosts that a server answers for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest

from clipgraft.serve.api import create_app, keys
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend

OURS = ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.0.0.1", "192.168.1.5:80", "[::1]:8000", "[::1]"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.1",
    "",
]


def asked(web: WebArgs, hosts: Sequence[str]) -> list[httpx.Response]:
    """Ask a server for what it serves, under the name of each host."""
    app = create_app(ScriptedBackend, web)

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            return [await client.get("/describe", headers={"Host": host}) for host in hosts]

    return asyncio.run(answers())


def test_a_page_that_rebinds_its_name_reads_nothing() -> None:
    """Any page that a user opens could search the pictures that are served on the same machine."""
    refused = asked(WebArgs(), OTHERS)
    assert {answer.status_code for answer in refused} == {421}
    told = refused[0].json()["error"]
    assert told["code"] == "unknown_host"
    assert "evil.example" in told["message"]
    assert "--allowed-hosts evil.example" in told["message"]
    assert "fingerprint" not in refused[0].text


def test_addresses_and_names_of_this_machine_are_answered() -> None:
    """The server could not be asked by its own address."""
    assert {answer.status_code for answer in asked(WebArgs(), OURS)} == {200}
    assert asked(WebArgs(host="localhost"), ["localhost:8000", "evil.example"])[1].status_code == 421


@pytest.mark.parametrize("web", [WebArgs(allowed_hosts=("box.lan", "Search.Example")), WebArgs()])
def test_named_hosts_are_answered(web: WebArgs) -> None:
    """A proxy that passes on its own name, or a name in /etc/hosts, could not be used."""
    found = [answer.status_code for answer in asked(web, ["box.lan:8000", "search.example", "evil.example"])]
    assert found == ([200, 200, 421] if web.allowed_hosts else [421, 421, 421])


@pytest.mark.parametrize("web", [WebArgs(allowed_hosts=("*",)), WebArgs(host="0.0.0.0"), WebArgs(uds="/x")])
def test_servers_for_others_answer_for_any_host(web: WebArgs) -> None:
    """A server of a network would be unreachable by the names that it has there."""
    assert [answer.status_code for answer in asked(web, ["box.lan", "evil.example"])] == [200, 200]


def test_a_server_with_keys_answers_for_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server behind a proxy would need its name a second time, though a stranger's page has no key."""
    monkeypatch.setenv(keys.ENVIRONMENT, "secret")
    assert asked(WebArgs(), ["box.lan"])[0].status_code == 401
