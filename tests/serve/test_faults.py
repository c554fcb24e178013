"""A server under what goes wrong: killed workers, slow clients, damaged adapters, long days."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from served import NAMES, Served, family, make_adapters, offline, resident, serve

pytestmark = pytest.mark.slow
_TEXTS = [f"a {color} {thing} number {n}" for n in range(10) for color in NAMES for thing in ("cat", "car")]
_SOAK_SECONDS = float(os.environ.get("CLIPGRAFT_SOAK_SECONDS", "60"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def truth(places: dict[str, Path]) -> dict[str, np.ndarray[Any, Any]]:
    return offline(places, _TEXTS)


@pytest.fixture(scope="module")
def served(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = next(iter(places.values())).parent
    log = tmp_path_factory.mktemp("log") / "serve.log"
    flags = ("--adapters", str(root), "--allow-adapter-loading", "--adapter-root", str(root))
    with serve(*flags, log=log) as server:
        yield server


def test_a_killed_worker_costs_retries_and_no_answer_is_anothers(
    served: Served, places: dict[str, Path], truth: dict[str, np.ndarray[Any, Any]]
) -> None:
    """64 clients get each other's vectors, or none, when a worker is killed and an adapter is loaded anew."""
    counts: collections.Counter[str] = collections.Counter()
    worst = 0.0
    models = list(truth)
    before = min(float(np.abs(truth[a] - truth[b]).max()) for a in models for b in models if a != b)

    async def client(number: int, until: float, http: httpx.AsyncClient) -> None:
        nonlocal worst
        draw = random.Random(number)
        while time.monotonic() < until:
            model, row = draw.choice(models), draw.randrange(len(_TEXTS))
            body = {"model": model, "input": _TEXTS[row]}
            while True:
                answer = await http.post("/v1/embeddings", json=body)
                counts[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    vector = np.array(answer.json()["data"][0]["embedding"])
                    worst = max(worst, float(np.abs(vector - truth[model][row]).max()))
                    break
                assert answer.status_code in (429, 503), answer.text
                wait = answer.headers["retry-after"]
                await asyncio.sleep(min(float(wait), 1.0))

    async def trouble(http: httpx.AsyncClient) -> None:
        await asyncio.sleep(4)
        os.kill(max(served.children(), key=lambda pid: resident([pid])), signal.SIGKILL)
        counts["kills"] += 1
        await asyncio.sleep(1)
        for _ in range(60):
            body = {"lora_name": "red", "lora_path": str(places["red"]), "load_inplace": True}
            answer = await http.post("/v1/load_lora_adapter", json=body)
            if answer.status_code == 200:
                counts["reloads"] += 1
                if counts["reloads"] == 3:
                    return
            await asyncio.sleep(0.5)

    async def all_of_it() -> None:
        limits = httpx.Limits(max_connections=80)
        async with httpx.AsyncClient(
            base_url=served.address, timeout=90, limits=limits, trust_env=False
        ) as http:
            until = time.monotonic() + 25
            await asyncio.gather(trouble(http), *(client(n, until, http) for n in range(64)))

    asyncio.run(all_of_it())
    print(dict(counts), f"largest difference from offline {worst:.1e}, between adapters {before:.2f}")
    assert counts["200"] > 500
    assert counts["kills"] == 1
    assert counts["reloads"] == 3
    assert worst < 1e-4 < before


def test_slow_clients_hold_nobody_up(served: Served) -> None:
    """Connections that send a byte a second keep all others from being answered."""
    host, port = served.address.removeprefix("http://").split(":")
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
    head += b"Content-Type: application/json\r\n"
    held = []
    for _ in range(100):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(head if len(held) % 2 else head + b"\r\n{")
        held.append(connection)
    started = time.monotonic()
    for number in range(20):
        served.embed([f"a cat {number}"])
    assert time.monotonic() - started < 20
    for connection in held:
        connection.close()


def test_an_adapter_that_cannot_be_read_fails_alone(served: Served, places: dict[str, Path]) -> None:
    """A file cut short by a full disk takes down the adapters beside it, or is served as the base."""
    half = places["red"].parent / "half"
    half.mkdir()
    for file in places["red"].iterdir():
        content = file.read_bytes()
        (half / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    answer = served.client.post("/v1/load_lora_adapter", json={"lora_name": "half", "lora_path": str(half)})
    assert 400 <= answer.status_code < 500, answer.text
    assert "half" in answer.text
    refused = served.client.post("/v1/embeddings", json={"model": "half", "input": "a cat"})
    assert 400 <= refused.status_code < 500, refused.text
    assert served.embed(["a cat"], "red").shape[0] == 1


def test_memory_stays_flat(served: Served, truth: dict[str, np.ndarray[Any, Any]]) -> None:
    """A server grows by the hour until the system ends it. Ten minutes: CLIPGRAFT_SOAK_SECONDS=600."""
    models, samples = list(truth), []

    async def client(number: int, until: float, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            row = draw.randrange(len(_TEXTS))
            body = {"model": draw.choice(models), "input": f"{_TEXTS[row]} {draw.random()}"}
            answer = await http.post("/v1/embeddings", json=body)
            assert answer.status_code in (200, 429, 503)

    async def watch(until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(_SOAK_SECONDS / 12)
            samples.append(resident(family(served.process.pid)))

    async def all_of_it() -> None:
        until = time.monotonic() + _SOAK_SECONDS
        async with httpx.AsyncClient(base_url=served.address, timeout=90, trust_env=False) as http:
            await asyncio.gather(watch(until), *(client(n, until, http) for n in range(16)))

    asyncio.run(all_of_it())
    print([f"{sample / 1e6:.0f} MB" for sample in samples])
    third = len(samples) // 3  # a system that is short of memory takes pages back: to fall is no fault
    assert max(samples[-third:]) < 1.05 * max(samples[third:-third]) + 20e6
