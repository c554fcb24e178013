"""How much memory there is to use."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgraft.data import stored_rows


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000 kB available, in no container; its files are in the folder."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(stored_rows, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(stored_rows, "_GROUP", tmp_path)
    return tmp_path


def test_what_the_system_tells(machine: Path) -> None:
    """Memory that holds copies of files is free to use; counting it as used would waste most of a server."""
    assert stored_rows.available_memory() == 1_024_000


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("max", 5, 1_024_000), ("600", 100, 500), ("600", 700, 0), ("9000000", 1, 1_024_000)],
)
def test_what_the_container_tells(machine: Path, limit: str, used: int, left: int) -> None:
    """A run in a container of 8 GB on a machine of 500 GB would be killed."""
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text(f"{used}\n")
    assert stored_rows.available_memory() == left


def test_without_such_files(machine: Path) -> None:
    """Systems other than Linux must not stop a run; on this one the number is still a number."""
    (machine / "meminfo").unlink()
    found = stored_rows.available_memory()
    assert found is None or found > 0
