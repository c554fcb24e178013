"""Results as people and programs read them: a line of the numbers that matter, and what JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from clipgraft.models.sites import Site
from clipgraft.shown import shown_line

_LISTED = 4  # entries of a collection that are printed
_LONG = 400  # characters of a value


class Result:
    """What a function made, as a dataclass with `repr=False`: it prints on a line, and knows `to_dict`.

    A class names in `_shows` the attributes that are printed, by default its fields, and in `_hidden` those
    that `to_dict` leaves out.
    """

    _shows: ClassVar[tuple[str, ...]] = ()
    _hidden: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # only dataclasses are results
        names = self._shows or tuple(field.name for field in fields if field.name not in self._hidden)
        values = ((name, getattr(self, name)) for name in names)
        told = (f"{name} {_short(value)}" for name, value in values if value is not None and value != ())
        return f"{type(self).__name__}({', '.join(told)})"

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, text and numbers."""
        made: dict[str, Any] = plain(self, self._hidden)
        return made


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
