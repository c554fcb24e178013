"""Results as people and programs read them: a line of the numbers that matter, and what JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from clipgraft.models.sites import Site
from clipgraft.notebook_tables import Tabled
from clipgraft.shown import shown_line
from clipgraft.text_tables import Column, Table, table_of

_LISTED = 4  # entries of a collection that are printed
_LONG = 400  # characters of a value


class Result(Tabled):
    """What a function made, as a dataclass with `repr=False`: it prints on a line, and knows `to_dict`.

    In a notebook it is a table, by default with one row of what is printed.

    A class names in `_shows` the attributes that are printed, by default its fields, and in `_hidden` those
    that `to_dict` leaves out.
    """

    _shows: ClassVar[tuple[str, ...]] = ()
    _hidden: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        told = (f"{name} {_short(value)}" for name, value in self._shown().items())
        return f"{type(self).__name__}({', '.join(told)})"

    def table(self) -> Table:
        """What is printed, as one row."""
        return _rows_of([self], type(self).__name__)

    def _shown(self) -> dict[str, Any]:
        """What is printed, by name; nothing that is not there."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # only dataclasses are results
        names = self._shows or tuple(field.name for field in fields if field.name not in self._hidden)
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value != ()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, text and numbers."""
        made: dict[str, Any] = plain(self, self._hidden)
        return made


R = TypeVar("R", bound=Result)


class Results(Tabled, tuple[R, ...]):
    """Results of one kind: a tuple that a notebook shows as a table with a row for each."""

    def table(self) -> Table:
        """A row for each result, of what it prints."""
        return _rows_of(self, "")


def _rows_of(results: Sequence[Result], title: str) -> Table:
    shown = [result._shown() for result in results]
    names = list(dict.fromkeys(name for row in shown for name in row))
    values = [[plain(row.get(name)) for name in names] for row in shown]
    columns = [
        Column(name, _short, left=any(isinstance(row[place], (str, dict, list)) for row in values))
        for place, name in enumerate(names)
    ]
    return table_of(title, columns, values)


def plain(value: Any, without: frozenset[str] = frozenset()) -> Any:
    """Dataclasses, and what is computed from their fields, as dicts; sites as they are written."""
    if isinstance(value, Site):
        return str(value)
    if dataclasses.is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        numbers = {name: getattr(value, name) for name in _computed(type(value))}
        whole = {**named, **{name: n for name, n in numbers.items() if isinstance(n, (int, float, str))}}
        return {name: plain(inner, without) for name, inner in whole.items() if name not in without}
    if isinstance(value, Mapping):
        return {str(name): plain(inner, without) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, without) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _computed(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if isinstance(member, property)]


def _short(value: Any) -> str:
    """A value on a line: numbers as people write them, the first few of many."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return _some([f"{name} {_short(inner)}" for name, inner in value.items()], "{}")
    if isinstance(value, (list, tuple)):
        return _some([_short(inner) for inner in value], "[]")
    return shown_line(str(value))[:_LONG]


def _some(entries: list[str], brackets: str) -> str:
    more = [f"and {len(entries) - _LISTED:,} more"] if len(entries) > _LISTED else []
    return ", ".join([*entries[:_LISTED], *more]).join(brackets)
