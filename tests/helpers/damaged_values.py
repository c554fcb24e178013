"""Hypothesis strategies that damage valid nested dictionaries, to test readers of files from strangers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st

import clipgraft as cg

JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2.5,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "text\nof two lines",
    b"\x00",
    [],
    ["in_proj"],
    {},
    {1: 2},
    {"lora_A": 3},
    torch.zeros(()),
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    torch.ones(2, 5),
    torch.ones(3, 2, 2),
    torch.ones(2, 32, dtype=torch.int64),
    torch.ones(2, 32, dtype=torch.complex64),
    torch.ones(1).expand(10**6, 10**6),
    torch.ones(2, 32).to_sparse(),
    torch.empty(2, 32, device="meta"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List every path into nested dictionaries, the empty path included."""
    inner = [places(part, (*path, key)) for key, part in value.items()] if isinstance(value, dict) else []
    return [path, *(place for found in inner for place in found)]


def changed(value: Any, path: tuple[Any, ...], change: tuple[str, Any]) -> Any:
    """Copy nested dictionaries with the value at `path` replaced, removed or renamed."""
    kind, new = change
    if not path:
        return {**value, "surplus.lora_A": new} if kind == "add" and isinstance(value, dict) else new
    key, *rest = path
    copied = dict(value)
    if rest or kind in ("replace", "add"):
        copied[key] = changed(copied[key], tuple(rest), change)
    elif kind == "remove":
        del copied[key]
    else:
        copied[f"{key}x"] = copied.pop(key)
    return copied


def damaged(valid: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw copies of `valid` with one or two places damaged."""
    change = st.tuples(st.sampled_from(["replace", "remove", "rename", "add"]), st.sampled_from(JUNK))
    once = st.tuples(st.sampled_from(places(valid)[1:]), change).map(lambda both: changed(valid, *both))

    def again(value: Any) -> st.SearchStrategy[Any]:
        found = places(value)[1:] or [()]
        return st.tuples(st.sampled_from(found), change).map(lambda both: changed(value, *both))

    return st.one_of(once, once.flatmap(again))


_T = TypeVar("_T")


def read_or_one_line(read: Callable[[], _T], start: str) -> _T | None:
    """Call `read`; None if it raises an AdapterError whose message is one line that begins with `start`."""
    try:
        return read()
    except cg.errors.AdapterError as error:
        message = str(error)
    assert message.startswith(start)
    assert "\n" not in message
    return None
