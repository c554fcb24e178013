"""Conditions on metadata (`where`), such as `caption~cat and width>=640`.

    condition {"and" condition}        condition: COLUMN OPERATOR VALUE

Operators: `=` `!=` `<` `<=` `>` `>=`, and `~` `!~` for text that contains, or does not contain, the value
whatever the case. A value with blanks around it, or with the word `and` in it, goes in quotes.
Times are written `2024-05-31` or `2024-05-31T12:00`. A row without a value meets only `!=` and `!~`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

from clipgraft.errors import ConfigError
from clipgraft.search.store import need_pyarrow

_CONDITION = re.compile(
    r"""\s*(?P<column>\w+)\s*(?P<operator>!=|<=|>=|!~|=|<|>|~)\s*
    (?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>.*?))\s*(?:\s+and\s+|$)""",
    re.VERBOSE | re.IGNORECASE,
)
_COMPARE = {
    "=": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
_HOW = "write COLUMN OPERATOR VALUE, joined by 'and', such as: caption~cat and width>=640"


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a value, as text."""

    column: str
    operator: str
    value: str


def parse_where(text: str) -> tuple[Condition, ...]:
    """Parse conditions; raises ConfigError where they cannot be read."""
    found, place = [], 0
    while place < len(text):
        match = _CONDITION.match(text, place)
        if match is None or (
            match["bare"] is not None and (not match["bare"] or match["bare"][0] in "\"'~=<>!")
        ):
            raise ConfigError(f"`where={text!r}`: cannot be read from {text[place:].strip()!r} on; {_HOW}")
        value = next(match[name] for name in ("double", "single", "bare") if match[name] is not None)
        found.append(Condition(match["column"], match["operator"], value))
        place = match.end()
    if not found or re.search(r"\band\s*$", text, re.IGNORECASE):
        raise ConfigError(f"`where={text!r}`: a condition is missing; {_HOW}")
    return tuple(found)


def check_columns(conditions: Sequence[Condition], names: Sequence[str]) -> None:
    """Raise ConfigError for a column that the metadata lack."""
    for condition in conditions:
        if condition.column not in names:
            raise ConfigError(
                f"`where`: there is no column {condition.column!r}; there are {', '.join(names)}"
            )


def rows_where(table: Any, conditions: Sequence[Condition]) -> npt.NDArray[np.int64]:
    """Return the rows of a pyarrow table that meet all conditions; raises ConfigError for a wrong value."""
    met = np.ones(table.num_rows, bool)
    for condition in conditions:
        met &= _met(table.column(condition.column), condition)
    return np.flatnonzero(met)


def _met(column: Any, condition: Condition) -> npt.NDArray[np.bool_]:
    pa = need_pyarrow()
    import pyarrow.compute as pc

    if condition.operator.endswith("~"):
        if not pa.types.is_string(column.type):
            raise ConfigError(
                f"`where`: {condition.column}{condition.operator} is for text, not {column.type}"
            )
        found = pc.match_substring(column, condition.value, ignore_case=True)
        mask = pc.invert(found) if condition.operator == "!~" else found
    else:
        mask = getattr(pc, _COMPARE[condition.operator])(column, _value(column.type, condition))
    missing = condition.operator.startswith("!")
    result: npt.NDArray[np.bool_] = pc.fill_null(mask, missing).to_numpy()
    return result


def _value(kind: Any, condition: Condition) -> Any:
    pa = need_pyarrow()
    try:
        if pa.types.is_timestamp(kind):
            when = datetime.fromisoformat(condition.value)
            return pa.scalar(when if when.tzinfo else when.replace(tzinfo=timezone.utc), kind)
        if pa.types.is_integer(kind):
            number = float(condition.value)
            return pa.scalar(number)
        return pa.scalar(condition.value, kind)
    except (ValueError, TypeError) as error:
        what = "a time such as 2024-05-31" if pa.types.is_timestamp(kind) else "a number"
        raise ConfigError(
            f"`where`: {condition.column}: got {condition.value!r}, allowed is {what}"
        ) from error
