"""The script that trains the embedded base, at a small size: killed, it goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clipgraft as cg

SCRIPT = Path(__file__).parents[2] / "scripts" / "emoji" / "train_base.py"
TINY = (
    *("--scenes", "100", "--steps", "40", "--object-steps", "3", "--batch-size", "8", "--width", "48"),
    *("--object-batch-size", "8", "--warmup", "2", "--vocab-size", "1200", "--test-scenes", "10"),
    *("--save-every", "0", "--no-compile"),
)


def train(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start the script in a folder of its own."""
    command = [sys.executable, str(SCRIPT), *TINY, "--work", str(folder), "--out", str(folder / "out"), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cg.__file__).parents[1])}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=240)
    return errors


def step(folder: Path) -> int:
    return int(torch.load(folder / "checkpoint.pt", weights_only=True)["step"])


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """The base could be made again only by a machine that never stops, or would be another one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = train(whole)
    errors = finish(process)
    assert process.returncode == 0, errors
    first = train(killed)
    until = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert 0 < step(killed) < 40
    second = train(killed)
    errors = finish(second)
    assert second.returncode == 0, errors
    files = [folder / "out" / "model.safetensors" for folder in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = train(killed, "--lr", "3")
    assert "is of another run: --lr was 0.001; give that, or another --work" in finish(other)
    assert other.returncode != 0
