"""`where`: what it reads, and which rows meet it."""

from __future__ import annotations

import operator
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.errors import ConfigError
from clipgraft.search.filters import Condition, parse_where, rows_where

NAMES = ["a cat", "Một CON mèo", None, "dog and cat", ""]
SIZES = [10, 200, 30, None, 200]
TABLE = pa.table(
    {
        "caption": NAMES,
        "width": pa.array(SIZES, pa.int32()),
        "mtime": pa.array(
            [datetime(2024, 5, day, tzinfo=timezone.utc) for day in range(1, 6)], pa.timestamp("us", "UTC")
        ),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("caption~cat", [0, 3]),
        ("caption~con", [1]),
        ("caption!~CAT", [1, 2, 4]),
        ("caption='dog and cat'", [3]),
        ('caption~"and" and width!=3', [3]),
        ("width>=200", [1, 4]),
        ("width != 200 AND caption!~dog", [0, 2]),
        ("width<10.5", [0]),
        ("mtime>=2024-05-04", [3, 4]),
        ("mtime<2024-05-01T12:00", [0]),
        ("caption=''", [4]),
        ("caption~a.c", []),
    ],
)
def test_rows(text: str, rows: list[int]) -> None:
    """A filter would hide what was asked for, or show what was not."""
    assert rows_where(TABLE, parse_where(text)).tolist() == rows


@given(
    st.lists(
        st.tuples(st.sampled_from(["<", "<=", ">", ">=", "=", "!="]), st.integers(-5, 250)),
        min_size=1,
        max_size=4,
    )
)
def test_numbers_compare_as_in_python(conditions: list[tuple[str, int]]) -> None:
    """Several conditions must all hold, whatever they are."""
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
    compare |= {"=": operator.eq, "!=": operator.ne}
    text = " and ".join(f"width{sign}{value}" for sign, value in conditions)
    expected = [
        row
        for row, size in enumerate(SIZES)
        if all(sign == "!=" if size is None else compare[sign](size, value) for sign, value in conditions)
    ]
    assert rows_where(TABLE, parse_where(text)).tolist() == expected


@given(st.text(st.characters(exclude_characters='"', exclude_categories=("Cs",))))
def test_any_text_in_quotes_is_one_value(value: str) -> None:
    """A caption with blanks, operators or the word and in it could not be looked for."""
    assert parse_where(f'caption="{value}" and width>3') == (
        Condition("caption", "=", value),
        Condition("width", ">", "3"),
    )


@pytest.mark.parametrize(
    "text",
    ["", "caption", "caption~", "caption~cat and", "~cat", "width>>3", "width=3 or width=4 and", "a='b' c"],
)
def test_what_cannot_be_read(text: str) -> None:
    """A half-typed filter would be taken for another one."""
    with pytest.raises(ConfigError, match="`where"):
        parse_where(text)


@pytest.mark.parametrize(
    ("text", "says"), [("width>wide", "a number"), ("mtime>soon", "a time"), ("width~3", "is for text")]
)
def test_values_of_a_wrong_kind(text: str, says: str) -> None:
    """A number spelled wrongly would end in a traceback of pyarrow."""
    with pytest.raises(ConfigError, match=says):
        rows_where(TABLE, parse_where(text))


def test_no_rows() -> None:
    """An empty shard must not stop a search."""
    assert np.array_equal(rows_where(TABLE.slice(0, 0), parse_where("width>3")), np.empty(0))
