"""The example of two towers of one's own, run as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_it_learns_and_searches(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two towers of the user's own cannot be joined, trained, measured, encoded or searched."""
    program("own_towers").main(tmp_path, pictures=32)
    printed = capsys.readouterr().out
    before, after = (float(found) for found in re.findall(r"image_to_text: .*?R@10 ([\d.]+)", printed))
    assert after > before + 10
    assert len(re.findall(r"train_\d+\.png", printed.splitlines()[-1])) == 3
