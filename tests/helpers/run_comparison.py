"""Compare two run folders bit by bit, and let a run die at a chosen call."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


class Killed(BaseException):
    """Stands for a SIGKILL: a BaseException that nothing in the library catches."""


def events(run: Path) -> list[dict[str, Any]]:
    """Read `events.jsonl`, without the timings."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


def run_contents(run: Path) -> dict[str, Any]:
    """Read all of a run that must be reproducible: adapters as bytes, the checkpoint as tensors.

    The name of the run and its timings may differ, and are left out.
    """
    files = {str(file.relative_to(run)): file for file in sorted(run.rglob("*")) if file.is_file()}
    found: dict[str, Any] = {
        name: file.read_bytes() for name, file in files.items() if file.suffix in (".safetensors", ".json")
    }
    for name in ("results.json", "params.json", "results/result.json"):
        found.pop(name, None)
    found["latest"] = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    found["files"] = sorted(name for name in files if "tensorboard" not in name)
    found["history"] = json.loads((run / "results.json").read_text())["history"]
    return found


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """List the paths at which two nested values differ."""
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{path}: {left.keys() ^ right.keys()}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple):
        pairs = zip(left, right, strict=True)
        return [
            found for number, pair in enumerate(pairs) for found in differences(*pair, f"{path}/{number}")
        ]
    return [] if left == right else [path]


@contextlib.contextmanager
def dies_at(where: object, name: str, call: int, *, before: bool) -> Iterator[None]:
    """Raise Killed before or after the given call (from 1) of a function, and catch it."""
    real, count = getattr(where, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if before and count[0] == call:
            raise Killed
        result = real(*args, **kwargs)
        if count[0] == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, dying)
        try:
            yield
        except Killed:
            return
    pytest.fail(f"{name} was not called {call} times")
