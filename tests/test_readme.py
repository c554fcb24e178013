"""The README's own blocks run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"^(?P<skip><!-- not run: .+? -->\n)?```(?P<kind>python|bash)\n(?P<body>.+?)^```", re.M | re.S
)
BLOCKS = [(m["kind"], m["body"], m["skip"]) for m in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def commands(body: str) -> list[str]:
    """The clipgraft commands of a shell block, continued lines joined."""
    lines = body.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("clipgraft ")]


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path) -> None:
    """A newcomer copies the README line by line; a block that fails loses them."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for kind, body, skip in BLOCKS:
        if skip:
            continue
        steps = (
            [[sys.executable, "-c", body]]
            if kind == "python"
            else [["bash", "-ec", c] for c in commands(body)]
        )
        for step in steps:
            done = subprocess.run(step, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{step[-1]}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 3


def test_setup_commands_are_named() -> None:
    """The two commands that set everything up must stand in the README."""
    text = README.read_text(encoding="utf-8")
    assert all(command in text for command in ("make demo", "make test", "pip install"))
