"""Start a server, wait until it answers, read its memory, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LONGEST_START = 300.0


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        port: that it listens on.
        process: its first process, the leader of its group.
        path: of its embeddings.
        start_seconds: until it answered a real request.
    """

    port: int
    process: subprocess.Popen[bytes]
    path: str
    start_seconds: float

    @property
    def memory(self) -> int:
        """Resident bytes of all its processes, shared pages counted once (PSS)."""
        return sum(_proportional(pid) for pid in _family(self.process.pid))


@contextlib.contextmanager
def infinity(python: Path, models: Sequence[Path], flags: Sequence[str], log: Path) -> Iterator[Server]:
    """Infinity over local folders; requests name a model by its folder's name."""
    port = _free_port()
    command = [str(python.parent / "infinity_emb"), "v2", "--port", str(port), "--device", "cpu", *flags]
    for model in models:
        command += ["--model-id", str(model), "--served-model-name", model.name]
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    with _running(command, env, port, "/embeddings", models[-1].name, log) as server:
        yield server


@contextlib.contextmanager
def clipgraft(base: Path, flags: Sequence[str], model: str, log: Path) -> Iterator[Server]:
    """Our server over a base; `model` is what the first request asks for."""
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "clipgraft",
        "serve",
        "--model",
        f"hf:{base}",
        "--port",
        str(port),
        *flags,
    ]
    with _running(command, dict(os.environ), port, "/v1/embeddings", model, log) as server:
        yield server


@contextlib.contextmanager
def _running(
    command: Sequence[str], env: dict[str, str], port: int, path: str, model: str, log: Path
) -> Iterator[Server]:
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_it_answers(process, port, path, model, log)
        yield Server(port, process, path, time.perf_counter() - started)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_it_answers(
    process: subprocess.Popen[bytes], port: int, path: str, model: str, log: Path
) -> None:
    body = json.dumps({"model": model, "input": ["a cat"]}).encode()
    url, kind = f"http://127.0.0.1:{port}{path}", {"Content-Type": "application/json"}
    until = time.perf_counter() + _LONGEST_START
    while time.perf_counter() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=60):
                return
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} answered nothing in {_LONGEST_START:.0f} s; see {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [each for child in task.read_text().split() for each in _family(int(child))]
    return found


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
