"""`clipgraft demo`, as small as it can be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clipgraft.cli import main


def test_the_demo_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first command that a newcomer types ends in an error."""
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--train-scenes", "100", "--test-scenes", "100"]) == 0
    printed = capsys.readouterr().out
    for row in ("base", "LoRA r=32", "full fine-tuning"):
        numbers = re.search(rf"^{row} +(\d+\.\d)", printed, re.MULTILINE)
        assert numbers is not None
        assert 0 < float(numbers[1]) <= 100
    adapter = re.search(r"^adapter +(.+)$", printed, re.MULTILINE)
    assert adapter is not None
    assert (Path(adapter[1]) / "adapter_model.safetensors").is_file()
    assert (out / "gallery.png").stat().st_size > 10_000
