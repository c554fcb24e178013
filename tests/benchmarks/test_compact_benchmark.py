"""The page on smaller models, at a size that says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import compact


def test_one_line_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the documentation cannot be made again."""
    monkeypatch.setattr(compact, "_TEST", 6)
    monkeypatch.setattr(compact, "_ROUNDS", 1)
    monkeypatch.setitem(compact._TRAINING, "batch_size", 10)
    page = compact.measure(tmp_path, scenes=2, epochs=1)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [9] * 6
    assert rows[1][:2] == ["| base", "5,576,065"]
    assert all(row[-1].strip(" |").isdigit() for row in rows[-2:])
