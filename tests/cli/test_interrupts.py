"""Ctrl-C in commands that take long, sent to all processes of a terminal at different moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")]
# A shell's background job has SIGINT ignored, and the tests in it too.
_SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from clipgraft.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def interrupted(words: Sequence[object], moment: str, folder: Path) -> str:
    """Run a command, send SIGINT to its group once a line begins with `moment`; returns standard error."""
    script = folder / "command.py"
    script.write_text(_SCRIPT)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-u", str(script), *map(str, words)]
    with subprocess.Popen(command, start_new_session=True, cwd=folder, **pipes) as running:
        assert running.stdout is not None
        assert any(line.startswith(moment) for line in running.stdout)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130, err
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if line.startswith("clipgraft: ")]
    assert len(told) == 1
    assert err.endswith(f"{told[0]}\n")
    return told[0]


@pytest.mark.parametrize("moment", ["base ", "cell 1 of 1", "epoch 0"])
def test_a_sweep_goes_on_where_ctrl_c_stopped_it(
    moment: str, cli: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """The request is lost while the process of a cell starts, or the table has half a cell."""
    words = ["sweep", *base, "--train-data", table, "--val-data", table, "--workers", 0, "--batch-size", 8]
    words += ["--targets", "text.0.q", "--lora-r", 1, "--no-full", "--no-base", "--epochs", 1]
    words += ["--logs", tmp_path / "logs", "--feature-cache", "none"]
    interrupted(words, moment, tmp_path)
    sweep = tmp_path / "logs" / "sweep"
    assert not [*sweep.glob("table.*"), *sweep.rglob("cell.json")]
    assert cli(*words).code == 0
    assert (sweep / "table.md").is_file()


@pytest.mark.parametrize("moment", ["making", "base: R@1", "LoRA r="])
def test_a_demo_that_is_stopped_leaves_nothing_half_written(moment: str, tmp_path: Path) -> None:
    """A picture is cut short, or a page of traceback follows Ctrl-C."""
    words = ["demo", "--out", tmp_path / "demo", "--train-scenes", 100, "--test-scenes", 100]
    interrupted(words, moment, tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".tmp", ".html")]
    assert left == []
    assert not (tmp_path / "demo" / "results.json").exists()
