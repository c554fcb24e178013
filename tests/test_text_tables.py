"""Tables as text and Markdown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.text_tables import (
    Table,
    aligned,
    display_width,
    percent,
    short,
    signed,
    terminal_width,
    with_deviation,
    with_interval,
)


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


def test_numbers_stay_below_each_other() -> None:
    """A number with a unit, a deviation or an interval is pushed away from those without."""
    rows = [
        ("model", "R@1", "MACs", "gain"),
        ("base", "9.5", "0", ""),
        ("linear", with_deviation(61.25, 0.44), "1.96 T", with_interval(3.1, -0.04, 5)),
        ("full", with_deviation(60.0, None), "12 G", with_interval(-3.1, -12.0, 5)),
    ]
    assert aligned(rows) == [
        "model          R@1    MACs                  gain",
        "base     9.5           0",
        "linear  61.2 ± 0.4  1.96 T  +3.1 (0.0 to +5.0)",
        "full    60.0          12 G  -3.1 (-12.0 to +5.0)",
    ]


def test_a_narrow_terminal_gets_blocks_of_columns() -> None:
    """Lines that a terminal breaks wherever they end cannot be read as a table."""
    table = Table("t", ("site", "a", "b", "c"), (("text.0.q", "1", "22", "333"), ("v", "4", "5", "6")))
    assert table.text(14).splitlines() == [
        *("t", "site      a", "text.0.q  1", "v         4", ""),
        *("site       b", "text.0.q  22", "v          5", ""),
        *("site        c", "text.0.q  333", "v           6"),
    ]
    assert table.text(200) == table.text(None) == table.text()


def test_rows_that_two_columns_name() -> None:
    """Beside the target set alone nobody can tell which rank a number belongs to."""
    rows = (("linear", "4", "1,000", "61.0"), ("linear", "16", "4,000", "62.5"))
    table = Table("", ("model", "r", "trained", "R@1"), rows, "a note of some length", keys=2)
    assert table.text(20).splitlines() == [
        *("model    r  trained", "linear   4    1,000", "linear  16    4,000", ""),
        *("model    r   R@1", "linear   4  61.0", "linear  16  62.5"),
        *("a note of some", "length"),
    ]


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_a_row_is_a_line(rows: list[tuple[str, str]]) -> None:
    """A class name with a line end in it breaks a table apart, or sends escape sequences to a terminal."""
    lines = aligned(rows)
    assert len(lines) == len(rows)
    assert not any(set(line) & set("\n\r\x1b") for line in lines)


def test_wide_characters() -> None:
    """Names of classes in Japanese, or with combining marks, shift the numbers beside them."""
    assert display_width("猫") == 2
    assert display_width("me\u0300o") == display_width("mèo") == 3
    lines = aligned([("猫", "1"), ("me\u0300o", "2"), ("abcd", "3")])
    assert [display_width(line) for line in lines] == [7, 7, 7]


def test_only_terminals_have_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in a file or a pipe is cut into blocks for a terminal that nobody looks at."""
    monkeypatch.setenv("COLUMNS", "40")
    assert terminal_width() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert terminal_width() == 40


@pytest.mark.parametrize(("value", "expected"), [(0.04, "0.0"), (-0.04, "0.0"), (3.1, "+3.1"), (-2, "-2.0")])
def test_differences_have_signs(value: float, expected: str) -> None:
    """A difference that rounds to nothing looks like a loss."""
    assert signed(value) == expected
