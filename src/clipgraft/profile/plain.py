"""Results as what JSON can hold."""

from __future__ import annotations

import dataclasses
from typing import Any

from clipgraft.models.sites import Site


def plain(value: Any, without: frozenset[str] = frozenset()) -> Any:
    """Dataclasses, and what is computed from their fields, as dicts; sites as they are written."""
    if isinstance(value, Site):
        return str(value)
    if dataclasses.is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        numbers = {name: getattr(value, name) for name in _computed(type(value))}
        whole = {**named, **{name: n for name, n in numbers.items() if isinstance(n, (int, float, str))}}
        return {name: plain(inner, without) for name, inner in whole.items() if name not in without}
    if isinstance(value, dict):
        return {str(name): plain(inner, without) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, without) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _computed(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if isinstance(member, property)]
