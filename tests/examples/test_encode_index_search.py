"""The example of encoding and searching, run as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_it_searches_what_it_encoded(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first search that a newcomer tries fails, ignores its filter, or encodes everything again."""
    main = program("encode_index_search").main
    flags = ["--out", str(tmp_path), "--train-scenes", "40", "--pictures", "24"]
    main(flags)
    first = capsys.readouterr().out
    assert "24 images encoded, 0 known, 24 vectors" in first
    assert "Flat, 24 vectors" in first
    main(flags)
    second = capsys.readouterr().out
    assert "0 images encoded, 24 known, 24 vectors" in second
    assert "trained" not in second
    assert answers(second) == answers(first)
    text, filtered, picture, both = answers(first).values()
    assert [len(found) for found in (text, picture, both)] == [3, 3, 3]
    assert filtered
    assert all("hai" in line for line in filtered)
    assert "images/test_00001.png" in picture[0]


def answers(printed: str) -> dict[str, list[str]]:
    """Result lines by the query above them."""
    queries = re.findall(r"^(\S.+)\n((?:  \d  .+\n?)+)", printed, re.M)
    return {title: results.splitlines() for title, results in queries}


@pytest.mark.slow
def test_the_adapter_finds_more(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example shows an adapter that finds no more than the base over the same vectors."""
    program("encode_index_search").main(["--out", str(tmp_path)])
    shares = re.search(r"base ([\d.]+)%, adapter ([\d.]+)%", capsys.readouterr().out)
    assert shares is not None
    assert float(shares[2]) >= float(shares[1]) + 5
