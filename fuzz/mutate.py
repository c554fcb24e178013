"""Damage a file: its bytes, or the values that it holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

ESCAPES = (
    *("../home/precious.txt", "../home", "/etc/passwd", "..", ".", "/", "~"),
    *("a/../../home", "..\\home", "C:\\x"),
)
TEXTS = ("", " ", "\0", "a\0b", "\x1b[2J", "a\nb", "\u202egnp.a", "\ud800", "x" * 5000, "nan", "{}", "(a+)+$")
NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400)
FLOATS = (0.5, -0.0, 1e300, 1e-320, float("inf"), float("-inf"), float("nan"))
INTERESTING = (
    *(b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\r", b'"'),
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"),
)


def junk(rng: Random) -> Any:
    """Return a plain value that belongs nowhere."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind == 3:
        return rng.choice(ESCAPES)
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice(([], [None], [[]], [1, 2, 3], ["a"] * 50))
    if kind == 6:
        return rng.choice(({}, {"": 1}, {"a": {}}, {"../home": [1, "x"]}, {"name": "x", "r": 3}))
    deep: Any = rng.choice((1, "x"))
    for _ in range(rng.choice((3, 30, 70, 500))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List every path into nested dictionaries and lists, the empty path included."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*path, key))
    return found


def odd(value: Any, rng: Random, new: Callable[[Random], Any] = junk) -> Any:
    """Copy nested dictionaries and lists with a few places replaced, removed, renamed or doubled."""
    try:
        return _odd(copy.deepcopy(value), rng, new)
    except (RecursionError, OverflowError, ValueError):  # of what was put in before
        return new(rng)


def _odd(changed: Any, rng: Random, new: Callable[[Random], Any]) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = places(changed)
        if len(known) == 1 or rng.random() < 0.02:
            changed = new(rng)
            continue
        *above, key = rng.choice(known[1:])
        owner = changed
        for step in above:
            owner = owner[step]
        what = rng.randrange(8)
        if what <= 3:
            owner[key] = new(rng)
        elif what == 4:
            del owner[key]
        elif what == 5:
            owner[key] = _near(owner[key], rng)
        elif what == 6 and isinstance(owner, dict):
            owner[rng.choice(ESCAPES + TEXTS)] = owner.pop(key) if rng.random() < 0.5 else new(rng)
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[key] = copy.deepcopy(rng.choice(list(owner.values())))
    return changed


def _near(value: Any, rng: Random) -> Any:
    """Return a value of the same kind that is slightly wrong."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 2**40,
                value + 0.5 if abs(value) < 2**60 else 0.5,
                str(value),
            )
        )
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), [value], rng.choice(ESCAPES) + value))
    return [value]


def odd_json(value: Any, rng: Random, text: Callable[[Any], str] = json.dumps) -> bytes:
    """Write a value as JSON, mostly with wrong values, sometimes with wrong bytes."""
    if rng.random() < 0.25:
        return damaged(text(value).encode("utf-8", "surrogatepass"), rng)
    if rng.random() < 0.01:
        return rng.choice((b"[" * 100_000, b'{"a":' * 20_000, b"1" * 10_000, b"\xff\xfe{\0}\0", b"nul"))
    try:
        return text(odd(value, rng)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return b"null"


def damaged(content: bytes, rng: Random) -> bytes:
    """Flip, cut, double or overwrite one to four places of some bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not changed:
            return bytes(changed)
        at, what = rng.randrange(len(changed)), rng.randrange(8)
        length = rng.choice((1, 2, 4, 16, 200))
        if what <= 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            changed[at] = rng.randrange(256)
        elif what == 3:
            changed[at:] = b"" if rng.random() < 0.5 else changed[at + length :]
        elif what == 4:
            changed[at:at] = rng.choice((*INTERESTING, changed[at : at + length], rng.randbytes(length)))
        elif what == 5:
            new = rng.choice(INTERESTING)
            changed[at : at + len(new)] = new
        elif what == 6:
            changed[at : at + length] = rng.randbytes(min(length, len(changed) - at))
        else:
            other = rng.randrange(len(changed))
            changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


def odd_lines(lines: Sequence[str], rng: Random, separators: str = ",;\t|") -> bytes:
    """Damage cells, quotes, separators or line ends of a text table, sometimes its bytes."""
    changed = list(lines)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed))
        cells = changed[at].split(separators[0])
        what = rng.randrange(9)
        if what <= 2:
            cells[rng.randrange(len(cells))] = str(rng.choice(ESCAPES + TEXTS))
        elif what == 3:
            cells[rng.randrange(len(cells))] = f'"{rng.choice(TEXTS)}'
        elif what == 4:
            del cells[rng.randrange(len(cells))]
        elif what == 5:
            cells.insert(0, str(rng.choice(NUMBERS[:-1])))
        elif what == 6:
            cells = [rng.choice(separators).join(cells)]
        elif what == 7:
            changed.insert(at, changed[rng.randrange(len(changed))])
        else:
            cells = [cells[0] * rng.choice((0, 2, 3000))]
        changed[at] = separators[0].join(cells)
    content = rng.choice(("\n", "\n", "\r\n", "\r", "\x85")).join(changed).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-16-le", "utf-8-sig")))
    return damaged(content, rng) if rng.random() < 0.3 else content
