"""The largest memory of a stretch of work."""

from __future__ import annotations

import sys

import pytest
import torch

from clipgraft.models.peak import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the mark")
def test_a_stretch_is_charged_for_its_own_memory() -> None:
    """The table blames a small run for what a larger one before it took, or misses what is freed."""
    with peak_memory() as small:
        before = small()
    assert before is not None
    with peak_memory() as large:
        held = [torch.ones(64, 1024) for _ in range(400)]
        del held
        high = large()
    with peak_memory() as again:
        after = again()
    assert high is not None
    assert after is not None
    assert high > before + 90
    assert after < before + 30
