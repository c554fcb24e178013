"""The page about engines says what was measured, and what could not be."""

from __future__ import annotations

import torch
from benchmarks.contestants import engines
from benchmarks.contestants.engines import REFERENCE
from benchmarks.engines import recall_table, speed_table


def test_an_engine_that_is_missing_or_breaks_is_told(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """One package that is not installed would end the whole comparison, or vanish from it."""

    def missing(world: object) -> None:
        raise ImportError("no", name="openvino")

    def broken(world: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    made = {REFERENCE: lambda world: lambda pixels: pixels, "a": missing, "b": broken}
    monkeypatch.setattr(engines, "ENGINES", made)
    world = engines.World(None, torch.zeros(2, 3), 1, 1, None)  # type: ignore[arg-type]
    ready, absent = engines._ready(world, compiled=True)
    assert list(ready) == [REFERENCE]
    assert absent == {"a": "openvino is not installed", "b": "RuntimeError: no kernel for this"}


def test_tables_by_hand() -> None:
    """Ratios would be of another engine, or recall a share where the header says percent."""
    one = {"rates": [1, 2, 3], "cpu_rates": [1, 4], "least": 1.0, "mean": 1.0, "recall": 0.5, "points": 0.0}
    two = {"rates": [4, 8, 8], "cpu_rates": [2, 3], "least": 0.999, "mean": 1, "recall": 0.49, "points": 1.0}
    values = {"engines": {REFERENCE: one, "clipgraft int8": two}}
    speed, recall = speed_table(values).rows, recall_table(values).rows
    assert (speed[1][0], speed[1][2:6]) == ("clipgraft int8", ("8", "4.00x", "3", "0.99900"))
    assert recall[1][1:] == ("0.99900", "1.00000", "49.0", "1.00")
