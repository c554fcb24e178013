"""The example of three tasks on one base, run as a user runs it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "three_tasks.py"
TASKS = ("vi", "tr", "style")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the program with a folder and flags; gives what it prints."""
    specification = importlib.util.spec_from_file_location("three_tasks", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    program = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "three_tasks", program)  # where its dataclasses look for themselves
    specification.loader.exec_module(program)

    def run(out: Path, *flags: str) -> str:
        capsys.readouterr()
        program.main(["--out", str(out), *flags])
        return capsys.readouterr().out

    return run


def table(text: str) -> dict[str, list[float]]:
    """The percentages of each adapter on all tasks."""
    lines = (re.match(r"(\w+) +([\d.]+) % +([\d.]+) % +([\d.]+) %$", line) for line in text.splitlines())
    return {m[1]: [float(m[i]) for i in (2, 3, 4)] for m in lines if m}


def test_it_runs_and_finds_its_adapters_again(run: Callable[..., str], tmp_path: Path) -> None:
    """The first program that a newcomer with several tasks copies ends in a traceback."""
    first = run(tmp_path, "--quick")
    assert set(table(first)) == {"none", *TASKS}
    assert [first.count(f"trained '{task}'") for task in TASKS] == [1, 1, 1]
    kept = {task: (tmp_path / "adapters" / task / "adapter_model.safetensors").stat() for task in TASKS}
    second = run(tmp_path, "--quick")
    assert "trained" not in second
    assert table(second) == table(first)
    for task, before in kept.items():
        after = (tmp_path / "adapters" / task / "adapter_model.safetensors").stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.slow
def test_every_adapter_clearly_wins_its_own_task(run: Callable[..., str], tmp_path: Path) -> None:
    """The example shows three adapters that are no better at their task than the base or than each other."""
    scores = table(run(tmp_path))
    for column, task in enumerate(TASKS):
        others = [row[column] for name, row in scores.items() if name != task]
        # Of 500 pictures five points are more than two standard errors.
        assert scores[task][column] >= max(others) + 5, scores
