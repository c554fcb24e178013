"""Bodies that were damaged at random: each is answered or refused, none is a fault of ours."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from clipgraft.serve.api import create_app
from clipgraft.serve.args import WebArgs
from lent_backend import LentBackend
from served_app import running

_ODD = [
    None,
    True,
    -1,
    10**40,
    1e-320,
    "",
    "\0",
    "\u202e",
    "a" * 40_000,
    [],
    [[]],
    {},
    {"": 0},
    {"image": {}},
]


@pytest.fixture(scope="module")
def address(backend: LentBackend) -> Iterator[str]:
    """Serve with small limits."""
    with running(create_app(lambda: backend, WebArgs(max_body_mb=0.2, max_items=16))) as url:
        yield url


def damaged(value: Any, chance: random.Random) -> bytes:
    """Change a body's values, then perhaps its bytes."""
    body = bytearray(json.dumps(_changed(value, chance)).encode())
    for _ in range(chance.choice([0, 0, 1, 3])):
        place = chance.randrange(len(body))
        how = chance.randrange(3)
        if how == 0:
            body[place] = chance.randrange(256)
        elif how == 1:
            del body[place : place + chance.randrange(1, 9)]
        else:
            body[place:place] = bytes(chance.choices(b'{}[]",:0e-\\\xff\x00', k=chance.randrange(1, 9)))
        body = body or bytearray(b"{}")
    return bytes(body)


def _changed(value: Any, chance: random.Random) -> Any:
    if chance.random() < 0.15:
        return chance.choice(_ODD)
    if isinstance(value, dict):
        return {key: _changed(item, chance) for key, item in value.items() if chance.random() < 0.95}
    return [_changed(item, chance) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_body_is_a_fault_of_ours(address: str, count: int) -> None:
    """A strange client would fill the log with tracebacks, or be told nothing."""
    chance = random.Random(count)
    seen = Counter[int]()
    with httpx.Client(base_url=address, timeout=120) as client:
        paths = client.get("/openapi.json").json()["paths"]
        examples = [
            (path, example["value"])
            for path, methods in paths.items()
            for example in methods.get("post", {})
            .get("requestBody", {"content": {"application/json": {}}})["content"]["application/json"]
            .get("examples", {})
            .values()
        ]
        for _ in range(count):
            path, value = chance.choice(examples)
            body = damaged(value, chance)
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            seen[answer.status_code] += 1
            assert answer.status_code < 500, (path, body[:2000])
            assert answer.status_code == 200 or set(answer.json()) == {"error"}
    assert seen[200] > count / 50
    assert seen[400] > count / 4
