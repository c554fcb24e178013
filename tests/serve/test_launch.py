"""A server's processes, over real HTTP: what is under way when a model is lost, or the server is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from clipgraft.errors import ConfigError
from clipgraft.serve.args import WebArgs
from clipgraft.serve.listening import address_of, leave, listen

HELPERS = Path(__file__).parents[1] / "helpers"


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    starts: Path

    @property
    def models(self) -> list[int]:
        """The processes of models that were started."""
        return [int(line) for line in self.starts.read_text().splitlines()]

    def client(self) -> httpx.Client:
        if self.url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
            return httpx.Client(transport=transport, base_url="http://here", timeout=60)
        return httpx.Client(base_url=self.url, timeout=60)

    def stop(self, kind: int = signal.SIGTERM) -> int:
        self.process.send_signal(kind)
        return self.process.wait(60)


@contextlib.contextmanager
def running(folder: Path, recipe: dict[str, Any] | None = None, **web: Any) -> Iterator[Running]:
    """Start a server of a fake service, and end it."""
    starts = folder / "starts"
    built = json.dumps({"log": str(starts), **(recipe or {})})
    options = json.dumps({"port": 0, "page": False, **web})
    paths = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(HELPERS / "serve_fake.py"), options, built],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready "), (folder / "log").read_text()
        yield Running(process, line.split()[1], starts)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def embed(client: httpx.Client, text: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "fake", "input": text})


def length(answer: httpx.Response) -> float:
    """What the fake service makes of a text: its length."""
    found: float = answer.json()["data"][0]["embedding"][0]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server")) as found:
        yield found


def test_a_model_is_killed_under_load(server: Running) -> None:
    """A model that the system kills would leave requests hanging, or answer them with another's vectors."""
    wrong: list[str] = []
    seen: list[int] = []
    over = threading.Event()

    def ask(number: int) -> None:
        with server.client() as client:
            while not over.is_set():
                text = f"!sleep 0.0{number}" if number % 3 else "x" * (number + 1)
                answer = embed(client, text)
                seen.append(answer.status_code)
                if answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1:
                    time.sleep(0.05)
                elif answer.status_code != 200 or length(answer) != len(text):
                    wrong.append(f"{text}: {answer.status_code} {answer.text}")

    with ThreadPoolExecutor(16) as pool, server.client() as client:
        asking = [pool.submit(ask, number) for number in range(16)]
        try:
            for _ in range(2):
                before = server.models
                time.sleep(0.5)
                os.kill(before[-1], signal.SIGKILL)
                deadline = time.monotonic() + 60
                while len(server.models) == len(before) or client.get("/ready").status_code != 200:
                    assert client.get("/health").status_code == 200
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        finally:
            over.set()
        for one in asking:
            one.result()
        assert wrong == []
        assert set(seen) == {200, 503}
        assert "clipgraft_model_restarts_total" in client.get("/metrics").text


def test_requests_are_counted_and_logged(server: Running) -> None:
    """An operator would look at a page of zeros while the server answers."""
    with server.client() as client:
        for _ in range(3):
            assert embed(client, "seven77").headers["X-Request-ID"]
        assert client.get("/nowhere", headers={"X-Request-ID": "look"}).headers["X-Request-ID"] == "look"
        text = client.get("/metrics").text
    requests = 'clipgraft_requests_total{method="POST",process="0",route="/v1/embeddings",status="200"}'
    assert any(line.startswith(requests) for line in text.splitlines())
    assert 'clipgraft_errors_total{code="not_found",process="0"}' in text
    log = (server.starts.parent / "log").read_text()
    assert " 200 POST /v1/embeddings " in log
    assert " items=1 tokens=7 id=" in log
    assert "seven77" not in log


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stop_lets_requests_end(kind: int, tmp_path: Path) -> None:
    """Each new version of a server would cost the requests that are under way."""
    place = {"uds": str(tmp_path / "socket")} if kind == signal.SIGINT else {}
    with running(tmp_path, **place) as server, server.client() as client, ThreadPoolExecutor(4) as pool:
        assert length(embed(client, "abc")) == 3
        asking = [pool.submit(embed, client, "!sleep 1") for _ in range(4)]
        time.sleep(0.5)
        server.process.send_signal(kind)
        answers = [one.result() for one in asking]
        assert server.process.wait(30) == 0
        assert [answer.status_code for answer in answers] == [200] * 4
        if kind == signal.SIGTERM:
            port = int(server.url.rpartition(":")[2])
            with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                pass
        assert not Path(f"/proc/{server.models[0]}").exists()
        assert "stopping: 4 requests under way have 20 s" in (tmp_path / "log").read_text()
    assert not (tmp_path / "socket").exists()


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    """A request that never ends would keep a server from being replaced; and end without an answer."""
    with running(tmp_path, drain_seconds=0.5) as server, server.client() as client:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(embed, client, "!sleep 50")
            time.sleep(0.5)
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 10
            answer = asking.result()
        assert answer.status_code == 503
        assert "the server is stopping" in answer.json()["error"]["message"]
        assert answer.headers["Retry-After"]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Somebody in a hurry would reach for kill -9, which leaves a socket's file behind."""
    path = tmp_path / "socket"
    with running(tmp_path, uds=str(path)) as server, server.client() as client:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(embed, client, "!sleep 50")
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
            with pytest.raises(httpx.HTTPError):
                asking.result()
        assert not path.exists()


@pytest.mark.slow
def test_a_model_that_is_lost_for_good(tmp_path: Path) -> None:
    """systemd would keep a server that answers nothing any more, as its web side lives."""
    with running(tmp_path, {"only_once": True}) as server, server.client() as client:
        os.kill(server.models[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (health := client.get("/health")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert health.json()["error"]["code"] == "failed"
        assert embed(client, "x").status_code == 503
        assert server.process.wait(60) == 1
        assert (tmp_path / "log").read_text().endswith("when memory is short), 5 times in a row\n")


@pytest.mark.slow
def test_two_processes_share_a_port(tmp_path: Path) -> None:
    """One process of Python would be all that a large machine gives; or each count for itself alone."""
    with running(tmp_path, workers=2) as server:
        models: set[float] = set()
        for _ in range(200):
            with server.client() as client:
                models.add(embed(client, "abc").json()["data"][0]["embedding"][1])
            if len(models) == 2:
                break
        assert len(models) == 2
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with server.client() as client:
                text = client.get("/metrics").text
            if all(f'clipgraft_ready{{process="{number}"}} 1.0' in text for number in (0, 1)):
                break
            time.sleep(0.2)
        else:
            raise AssertionError(text)
        web = {
            int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in server.models
        }
        os.kill(web.pop(), signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool, server.client() as client:
            while len(server.models) < 3:
                time.sleep(0.05)
            asking = pool.submit(embed, client, "!sleep 1")
            time.sleep(0.3)
            assert server.stop() == 0
            assert asking.result().status_code in (200, 503)  # 503 of the one that was just started again
        assert not any(Path(f"/proc/{pid}").exists() for pid in server.models)


def test_places_that_cannot_be_listened_on(tmp_path: Path) -> None:
    """A second server would load its model for a minute and then end in a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"`port={port}` of 127.0.0.1 is in use"):
            listen(WebArgs(port=port))
    with pytest.raises(ConfigError, match=r"`host='no such host'`: cannot be found"):
        listen(WebArgs(host="no such host"))
    with pytest.raises(ConfigError, match=r"`host='192.0.2.1'`: cannot be listened on"):
        listen(WebArgs(host="192.0.2.1"))
    path = tmp_path / "socket"
    web = WebArgs(uds=path)
    with listen(web), pytest.raises(ConfigError, match=r"socket is in use"):
        listen(web)
    with listen(web) as again:  # the first one left its file
        assert address_of(again, web) == f"unix:{path}"
    leave(web)
    assert not path.exists()
    path.write_text("a file of somebody's")
    with pytest.raises(ConfigError, match="there is something else"):
        listen(web)
    assert path.read_text() == "a file of somebody's"
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen(WebArgs(uds=tmp_path / "no folder" / "socket"))
