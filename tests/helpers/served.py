"""A real `clipgraft serve` process over the embedded base with adapters, and what each answer must be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import clipgraft as cg

NAMES = ("red", "green", "blue", "grey")


@dataclass
class Served:
    """A server process.

    Attributes:
        address: `http://127.0.0.1:PORT`.
        process: the command's own.
        log: the file with its output.
    """

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client = field(repr=False)

    def embed(self, texts: Sequence[str], model: str = "emoji") -> np.ndarray[Any, Any]:
        """(N, D) of the server."""
        answer = self.client.post("/v1/embeddings", json={"model": model, "input": list(texts)})
        answer.raise_for_status()
        return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)

    def children(self) -> list[int]:
        """Process ids below the command."""
        return [pid for pid in family(self.process.pid) if pid != self.process.pid]

    def wait_ready(self, seconds: float = 90) -> None:
        """Wait until `/ready` says so."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready in {seconds} s: {self.log.read_text()[-3000:]}")


def make_adapters(folder: Path, names: Sequence[str] = NAMES) -> dict[str, Path]:
    """Save adapters of both towers of the embedded base that change features a lot, each in its own way."""
    clip = cg.load("emoji")
    places = {}
    for number, name in enumerate(names):
        cg.apply_lora(clip, r=4, targets="attention", name=name)
        torch.manual_seed(number)
        with torch.no_grad():
            for path, weight in clip.model.named_parameters():
                if f".{name}." in path and path.endswith("lora_B"):
                    weight.normal_(std=0.3)
        places[name] = cg.save_adapter(clip, folder / name)
        cg.lora.remove_lora(clip)
    return places


def offline(places: dict[str, Path], texts: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """What the library itself gives for texts, by adapter; `emoji` is the base."""
    clip = cg.load("emoji")
    found = {}
    with torch.inference_mode():
        found["emoji"] = clip.encode_text(list(texts), normalize=True).numpy()
        for name, place in places.items():
            cg.load_adapter(clip, place, name=name)
            found[name] = clip.encode_text(list(texts), normalize=True).numpy()
            cg.lora.remove_lora(clip)
    return found


@contextlib.contextmanager
def serve(*flags: str, log: Path, **environment: str) -> Iterator[Served]:
    """Run `clipgraft serve --model emoji` with flags until the end of the block."""
    port = free_port()
    command = [sys.executable, "-m", "clipgraft", "serve", "--model", "emoji", "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            served = Served(address, process, log, client)
            served.wait_ready()
            yield served
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, by force if it must be."""
    below = family(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [each for child in task.read_text().split() for each in family(int(child))]
    return found


def resident(pids: Sequence[int]) -> int:
    """Resident bytes of processes, shared pages counted once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
