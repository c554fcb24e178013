"""Pages of mapped files are given back, and nothing that was written is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipgraft.process_memory import drop_mapped, trim_heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
_SIZE = 1 << 20


def _mapped(path: Path) -> Tensor:
    torch.arange(_SIZE, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=_SIZE)


def _resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_pages_are_given_back(tmp_path: Path) -> None:
    """A frozen tower that nobody needs any more would go on taking its memory."""
    tensor = _mapped(tmp_path / "numbers")
    total = tensor.double().sum()
    assert _resident(tmp_path / "numbers") == tensor.nbytes
    drop_mapped([tensor])
    assert _resident(tmp_path / "numbers") == 0
    assert tensor.double().sum() == total


def test_what_was_written_stays(tmp_path: Path) -> None:
    """Weights that an optimizer changed would turn back into those of the base."""
    tensor = _mapped(tmp_path / "numbers")
    tensor[_SIZE // 2] = -1
    drop_mapped([tensor])
    assert tensor[_SIZE // 2] == -1
    assert torch.from_file(str(tmp_path / "numbers"), shared=False, size=_SIZE)[_SIZE // 2] == _SIZE // 2


def test_ordinary_memory_stays() -> None:
    """Weights that were never in a file would be lost."""
    tensor = torch.arange(_SIZE, dtype=torch.float32)
    drop_mapped([tensor, tensor.view(1024, 1024).T, tensor[:0], tensor[:3]])
    trim_heap()
    assert torch.equal(tensor, torch.arange(_SIZE, dtype=torch.float32))
