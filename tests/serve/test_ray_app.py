"""`clipgraft serve --engine ray`: the same answers from replicas of Ray Serve."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import httpx
import pytest

from clipgraft.errors import ConfigError
from clipgraft.serve.args import WebArgs
from clipgraft.serve.messages import Statistics
from clipgraft.serve.ray_app import added, serve_on_ray
from fake_service import Recipe

HELPERS = Path(__file__).parents[1] / "helpers"

PROGRAM = """
import json, sys
from clipgraft.serve.args import WebArgs
from clipgraft.serve.ray_app import serve_on_ray
from fake_service import Recipe

web = WebArgs(**json.loads(sys.argv[1]))
sys.exit(serve_on_ray(Recipe(), web, lambda found: print("ready", found.base, flush=True)))
"""


def test_what_replicas_count_is_added() -> None:
    """`/metrics` would show one replica of many."""
    one = Statistics({"items_text": 2}, {"queue_text": 1.0}, {"compute": {"1": 1.0, "sum": 0.5}}, {"1": 1.0})
    two = Statistics({"items_text": 3, "rejected": 1}, {}, {"compute": {"1": 2.0, "inf": 1.0}}, {"1": 1.0})
    both = added([one, two])
    assert both.counts == {"items_text": 5, "rejected": 1}
    assert both.gauges == {"queue_text": 1.0}
    assert both.seconds == {"compute": {"1": 3.0, "sum": 0.5, "inf": 1.0}}
    assert both.batch_sizes == {"1": 2.0}


def test_keys_that_would_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on a cluster would be open to everybody, as keys of this environment do not get there."""
    monkeypatch.setenv("CLIPGRAFT_API_KEYS", "key")
    with pytest.raises(ConfigError, match="does not reach the machines"):
        serve_on_ray(Recipe(), WebArgs(ray_address="ray://there:1"), lambda _: None)


@pytest.mark.slow
def test_two_replicas_answer_over_http(tmp_path: Path) -> None:
    """Scaling out would change answers, or have every replica read every adapter."""
    pytest.importorskip("ray.serve", exc_type=ImportError)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), json.dumps({"port": port, "workers": 2, "drain_seconds": 5})],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line == "ready fake\n", line + (tmp_path / "log").read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _check(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _check(client: httpx.Client) -> None:
    def embed(model: str, text: str) -> httpx.Response:
        return client.post("/v1/embeddings", json={"model": model, "input": text})

    deadline = time.monotonic() + 30
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    seen: dict[str, set[float]] = defaultdict(set)
    for number in range(40):
        for model in ("fake", "vi"):
            answer = embed(model, "x" * number)
            assert answer.status_code == 200, answer.text
            length, replica = answer.json()["data"][0]["embedding"]
            assert length == number
            seen[model].add(replica)
        if number == 0:
            time.sleep(1)  # Ray tells the web side which replica has the adapter
            seen["vi"].clear()
    assert len(seen["fake"]) == 2
    assert len(seen["vi"]) == 1
    unknown = embed("vii", "x")
    assert unknown.status_code == 404
    assert "did you mean 'vi'" in unknown.json()["error"]["message"]
    full = embed("fake", "!overloaded")
    assert (full.status_code, full.headers["Retry-After"]) == (429, "8")
    while 'clipgraft_items_total{kind="text",process="0"} 8' not in client.get("/metrics").text:
        assert time.monotonic() < deadline + 30
        time.sleep(0.3)
