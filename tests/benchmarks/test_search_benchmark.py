"""The benchmark of search finds what is near, and counts it right."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.contestants import search
from benchmarks.search import EXACT, cells_of, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up vectors, queries and the truth."""
    place = tmp_path_factory.mktemp("vectors")
    search.prepare(str(place), rows=600, dim=16, queries=7)
    return place


def test_exact_ways_find_all_and_others_are_measured_against_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table would show the recall of an index against wrong answers."""
    monkeypatch.setattr(search, "_SECONDS", 0.0)
    given = {"folder": str(folder), "rows": 600, "dim": 16, "queries": 7}
    found = {EXACT: [search.exact(**given)]}
    for factory in ("Flat", "IVF16,SQ8", "HNSW8"):
        found[factory] = [search.by_faiss(**given, factory=factory)]
    assert found[EXACT][0]["recall"] == found["Flat"][0]["recall"] == 1
    assert 0.8 < found["IVF16,SQ8"][0]["recall"] <= 1
    assert found["IVF16,SQ8"][0]["effort"].startswith("nprobe")
    assert not (folder / "index").exists()
    rows = table(found).rows
    assert [row[:2] for row in rows[:2]] == [(EXACT, "100.0"), ("Flat", "100.0")]
    assert rows[0][2] == ""


@pytest.mark.parametrize(("rows", "cells"), [(10, 16), (200_000, 1024), (10_000_000, 8192)])
def test_cells_grow_with_the_root_of_the_vectors(rows: int, cells: int) -> None:
    """Ten million vectors would lie in sixteen cells."""
    assert cells_of(rows) == cells
