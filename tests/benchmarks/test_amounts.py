"""The table of recalls by amount of data, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import amounts


def test_one_line_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who repeats the table that the manual's advice stands on gets other rows, or a traceback."""
    monkeypatch.setattr(amounts, "_TESTS", 8)
    monkeypatch.setattr(amounts, "_GRID", ((8, 2, 16, (1e-3,), (5e-4,)),))
    amounts.main([str(tmp_path)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    trained = [row[1] for row in rows[2:]]
    assert trained == ["nothing", amounts.ATTENTION, amounts.MATRICES, amounts.FULL]
    assert [row[2:4] for row in rows[3:]] == [["0.001", "4"], ["0.001", "4"], ["0.0005", "4"]]
    assert {len(row) for row in rows} == {7}
    assert all(0 <= float(cell) <= 100 for row in rows[2:] for cell in row[4:])
