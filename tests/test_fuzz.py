"""`make fuzz` in small: every reader over some files that were broken on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fuzz import run
from fuzz.readers import READERS

INPUTS = 80
TOO_SLOW = {"weights.config", "containers.duckdb"}  # builds models; opens a database in 60 ms


@pytest.mark.parametrize("reader", sorted(READERS.keys() - TOO_SLOW))
def test_broken_files_are_one_line_each(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was cut short, or comes from elsewhere, ends in a traceback, a crash or a lost file."""
    monkeypatch.setattr(run, "SECONDS", 60.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.random.fork_rng():
        count = run.fuzz_here(reader, INPUTS, 0, tmp_path)
    assert count.inputs == INPUTS
    assert count.faults == 0, count.examples
