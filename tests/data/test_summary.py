"""The summary a person reads before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipgraft.data.reader import read_pairs
from clipgraft.data.summary import (
    BadRows,
    PairReport,
    count_long_captions,
)
from clipgraft.data.table import BadRow
from clipgraft.errors import DataError

CLEAN = PairReport(
    source=Path("train.csv"),
    kind="csv, separator tabs",
    unit="line",
    rows=40_455,
    bad_rows=0,
    images=8_091,
    captions=40_455,
    fewest_captions=5,
    most_captions=5,
    empty_captions=0,
    repeated_captions=0,
    missing_images=0,
    unreadable_images=0,
    duplicates=(),
    first_bad=(),
)


def line(text: str, start: str) -> str:
    """The one line of the summary that begins with `start`."""
    (found,) = [row for row in text.splitlines() if row.strip().startswith(start)]
    return found


def test_clean_data() -> None:
    """Clean data would look as if something were wrong with it, or a count be left out."""
    text = replace(CLEAN, long_captions=0, context_length=77).summary()
    assert line(text, "rows").split() == ["rows", "40,455"]
    assert line(text, "images").split() == ["images", "8,091"]
    assert line(text, "captions  ").split(maxsplit=2)[1:] == ["40,455", "5 an image"]
    for name in (
        "skipped rows",
        "empty captions",
        "repeated captions",
        "missing images",
        "unreadable images",
    ):
        assert line(text, name).split()[2:] == ["0"]
    assert line(text, "duplicate images").split()[-1] == "0"
    assert line(text, "captions over 77 tokens").split()[-1] == "0"
    assert len({row.index(row.split()[-1]) + len(row.split()[-1]) for row in text.splitlines()[4:]}) == 1


def test_every_problem_says_what_to_do() -> None:
    """A count without advice would leave the user to search for its meaning."""
    report = replace(
        CLEAN,
        bad_rows=23,
        fewest_captions=1,
        empty_captions=2,
        repeated_captions=3,
        missing_images=4,
        unreadable_images=1,
        duplicates=((Path("img/a.jpg"), Path("img/b.jpg")),),
        first_bad=tuple(BadRow(i, "x.jpg", "not found") for i in range(2, 12)),
        notes=('no column "filepath": took "image"',),
    )
    text = replace(report, long_captions=13, context_length=77).summary()
    assert '  note: no column "filepath": took "image"' in text.splitlines()
    assert line(text, "captions  ").endswith("1 to 5 an image, 5.00 on average")
    for name, count, advice in [
        ("skipped rows  ", "23", "`max_bad_rows`"),
        ("empty captions", "2", "left out"),
        ("repeated captions", "3", "kept once"),
        ("missing images", "4", "correct the paths"),
        ("unreadable images", "1", "replace the files"),
        ("duplicate images", "1", "a.jpg = b.jpg"),
        ("captions over 77 tokens", "13", "shorten them"),
    ]:
        assert f" {count}  " in line(text, name)
        assert advice in line(text, name)
    assert "  skipped rows, the first of each image:" in text.splitlines()
    assert line(text, "line 11:") == "    line 11: x.jpg not found"


def test_summary_of_real_files(tmp_path: Path) -> None:
    """The summary would not survive the data it is meant to describe."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = tmp_path / "t.csv"
    path.write_text("image,caption\na.png,phở bò\nb.png,bún chả\n", encoding="utf-8")
    text = read_pairs(path).report.summary()
    assert text.splitlines()[0] == f"{path} (csv, separator ',')"
    assert line(text, "skipped rows:") == "  skipped rows:"
    assert line(text, "line 3:") == f"    line 3: b.png not found in {tmp_path}"
    assert "tokens" not in text


@given(
    lengths=st.lists(st.integers(0, 120), max_size=60),
    context=st.integers(1, 100),
)
def test_long_captions(lengths: list[int], context: int) -> None:
    """Captions whose end the model never sees would go unnoticed, or whole ones be reported."""
    asked: list[int] = []

    def count_tokens(captions: Sequence[str]) -> list[int]:
        asked.append(len(captions))
        return [len(caption) + 2 for caption in captions]

    captions = ["x" * length for length in lengths]
    assert count_long_captions(captions, count_tokens, context) == sum(n + 2 > context for n in lengths)
    assert sum(asked) == len(captions)


def test_long_captions_are_counted_in_pieces() -> None:
    """Tokenizing millions of captions at once would fill the memory."""
    asked: list[int] = []

    def count_tokens(captions: Sequence[str]) -> list[int]:
        asked.append(len(captions))
        return [3] * len(captions)

    assert count_long_captions(["x"] * 10_000, count_tokens, 2) == 10_000
    assert max(asked) < 10_000


def test_bad_rows_keeps_only_the_first_few() -> None:
    """A million bad rows would fill the memory, or one lost image with its captions the whole list."""
    bad = BadRows(Path("t.csv"), "row", strict=False, limit=None)
    for number in range(1000):
        bad.add(BadRow(number, f"{number // 5}.jpg", "not found"))
    assert bad.count == 1000
    assert [row.number for row in bad.first] == list(range(0, 50, 5))
    assert bad.examples().count("row ") == 3


def test_limit_is_the_last_number_allowed() -> None:
    """`max_bad_rows` 3 would stop at the third row instead of beyond it."""
    bad = BadRows(Path("t.csv"), "line", strict=False, limit=3)
    for number in range(3):
        bad.add(BadRow(number, "", "broken quoting"))
    with pytest.raises(DataError, match="more than 3 rows cannot be used"):
        bad.add(BadRow(3, "", "broken quoting"))
