"""The example of a spreadsheet of translations"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_a_search_in_the_language_works(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way from translations to a search would break somewhere, or gain nothing."""
    small = ["--sentences", "160", "--scenes", "30", "--epochs", "4"]
    program("spreadsheet_of_translations").main(["--out", str(tmp_path / "a"), *small])
    printed = capsys.readouterr().out
    assert re.search(r"^  skipped rows +1\b", printed, re.M)
    assert "tokens for each word of the source" in printed
    gains = re.findall(r"^(\w+@1) +([\d.]+)% -> ([\d.]+)%", printed, re.M)
    assert len(gains) == 2
    assert all(float(after) > float(before) for _, before, after in gains)
    found = re.findall(r"^(\d)  \d\.\d{3}  (\S+)", printed, re.M)
    assert [rank for rank, _ in found] == list("12345")
    table = tmp_path / "a" / "translations.csv"
    assert table.read_text(encoding="utf-8-sig").startswith("English,Vietnamese")
