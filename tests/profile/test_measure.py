"""Times on this machine, and how numbers are written."""

from __future__ import annotations

import pytest
from torch import nn

from clipgraft.models.clip import as_clip
from clipgraft.profile import measure as measuring
from clipgraft.profile.forward import costs


def test_a_measurement_belongs_to_its_profile(
    tiny_openclip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Achieved speed is computed from another batch or another tower than was timed."""
    monkeypatch.setattr(measuring, "_REPEATS", 1)
    monkeypatch.setattr(measuring, "_MATRIX", 32)
    clip = as_clip(tiny_openclip)
    profile = costs(clip, batch=3, text_tokens=9)
    found = measuring.measure(clip, profile)
    for time, cost in zip(found.towers, profile.towers, strict=True):
        assert time.tower == cost.tower
        assert time.seconds * time.flops_per_second == pytest.approx(cost.trace.total.flops)
        assert time.seconds * time.rows_per_second == pytest.approx(3)
        assert time.of_matmul * found.matmul_flops_per_second == pytest.approx(time.flops_per_second)
    assert (found.device, found.dtype) == ("cpu", "float32")
