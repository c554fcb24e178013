"""Times on this machine, and how numbers are written."""

from __future__ import annotations

import pytest
from torch import nn

from clipgraft.models.clip import as_clip
from clipgraft.profile import measure as measuring
from clipgraft.profile.forward import costs
from clipgraft.profile.units import Table, percent, short


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


@pytest.mark.parametrize(
    ("number", "unit", "expected"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1 K"),
        (303_510_000, "", "303.51 M"),
        (977.124e12, "MACs", "977.12 TMACs"),
        (26.21e6, "FLOPs", "26.21 MFLOPs"),
        (0, "MACs", "0 MACs"),
    ],
)
def test_large_numbers_are_short(number: float, unit: str, expected: str) -> None:
    """A report is off by a factor of a thousand."""
    assert short(number, unit) == expected


def test_shares() -> None:
    """Shares of nothing fail, and a billion weights are called giga."""
    assert percent(1, 3) == "33.33%"
    assert percent(1, 0) == "0%"
    assert percent(1, 1) == "100%"
    assert short(8.36e9, billion="B") == "8.36 B"


def test_tables() -> None:
    """A table is out of line, or its markdown is broken by a cell with a bar."""
    table = Table("sizes", ("site", "MB"), (("text.0.q", "1"), ("a|b", "12.5")), "note")
    assert table.text().splitlines() == [
        "sizes",
        "site        MB",
        "text.0.q     1",
        "a|b       12.5",
        "note",
    ]
    assert table.markdown().splitlines() == [
        *(
            "## sizes",
            "",
            "| site | MB |",
            "| --- | ---: |",
            "| text.0.q | 1 |",
            "| a\\|b | 12.5 |",
            "",
            "note",
        ),
    ]
