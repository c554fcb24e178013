"""PEFT's regular expressions over module paths, matched in time that grows with their length alone.

`rank_pattern`, `alpha_pattern` and `target_modules` of an adapter from elsewhere are a stranger's programs
for `re`, which may run for ever. Here RE2 matches them, which never goes back; what Python and RE2 read
differently, and what no module path needs, is refused first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

Matches = Callable[[str], bool]

_LONGEST = 1000
_DEEPEST = 20
_MOST_MEMORY = 4 << 20
_COUNT = re.compile(r"\{\d{4,}|\{\d*,\d{4,}")
# Python reads these otherwise, or not at all; `\w`, `\d`, `\s`, `\b` and escaped signs are one in both.
_ESCAPE = re.compile(r"\\[^\W_]")
_ESCAPES = frozenset([r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"\b", r"\B"])
_GROUP = re.compile(r"\?(:|P<\w+>)")
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


class PatternError(ValueError):
    """A pattern that is not matched; the message says why."""


def end_of_path(key: str) -> Matches:
    """PEFT's rule for keys of `rank_pattern` and `alpha_pattern`: the end of a module path matches.

    Raises:
        PatternError: the key is no pattern, or one that is not matched here.
    """
    check_pattern(key)
    return _compiled(rf"(.*\.)?({key})$")


def whole_path(pattern: str) -> Matches:
    """PEFT's rule for a `target_modules` or `exclude_modules` that is one string: the whole path matches.

    Raises:
        PatternError: it is no pattern, or one that is not matched here.
    """
    check_pattern(pattern)
    return _compiled(rf"(?:{pattern})$")


def check_pattern(pattern: str) -> None:
    """Raise PatternError for what is not matched: its reason in a few words."""
    if len(pattern) > _LONGEST:
        raise PatternError(f"it has {len(pattern):,} characters, and at most {_LONGEST:,} are read")
    if _COUNT.search(pattern):
        raise PatternError("it counts beyond 999")
    if odd := [escape for escape in _ESCAPE.findall(pattern) if escape not in _ESCAPES]:
        raise PatternError(f"it uses {odd[0]}")
    if "[[" in pattern:
        raise PatternError("it uses [[")
    _check_groups(pattern)


def _check_groups(pattern: str) -> None:
    """Refuse groups with an option other than `?:` and a name, and repetitions inside repetitions."""
    repeats = [False]  # for each open group, whether it holds a repetition
    position = 0
    while position < len(pattern):
        sign = pattern[position]
        if sign == "\\":
            position += 2
        elif sign == "[":
            position = _end_of_class(pattern, position)
        elif sign == "(":
            if pattern[position + 1 : position + 2] == "?" and not _GROUP.match(pattern, position + 1):
                raise PatternError(f"it uses {pattern[position : position + 3]}")
            repeats.append(False)
            position += 1
            if len(repeats) > _DEEPEST:
                raise PatternError(f"its groups are nested more than {_DEEPEST} deep")
        elif sign == ")" and len(repeats) > 1:
            inner = repeats.pop()
            position += 1
            again = _REPEAT.match(pattern, position)
            if inner and again:
                raise PatternError("it repeats a group that repeats something itself")
            repeats[-1] = repeats[-1] or inner or again is not None
        elif _REPEAT.match(pattern, position):
            repeats[-1] = True
            position += 1
        else:
            position += 1


def _end_of_class(pattern: str, start: int) -> int:
    """Where `[…]` ends; a `]` that stands first is one of its signs."""
    position = start + 1
    position += pattern[position : position + 1] == "^"
    position += pattern[position : position + 1] == "]"
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1


def _compiled(expression: str) -> Matches:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_MEMORY
    try:
        compiled = re2.compile(expression, options)
    except re2.error as error:
        told = error.args[0] if error.args else ""
        text = told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)
        raise PatternError(f"it is no pattern ({text[:80]})") from error
    except UnicodeEncodeError as error:
        raise PatternError("it is no pattern (half of a surrogate pair)") from error
    return lambda path: compiled.match(path) is not None


def targeted(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The module paths that a PEFT configuration targets, by PEFT 0.21's own rules.

    `all-linear` depends on the kinds of modules, and is nobody's here.

    Raises:
        PatternError: it has a pattern that is not matched here, or a value of another type.
    """
    wanted = _selector(config.get("target_modules"), "target_modules")
    excluded = _selector(config.get("exclude_modules"), "exclude_modules")
    kept = _selector(config.get("modules_to_save"), "modules_to_save")
    layers = _layers(config) if isinstance(config.get("target_modules"), list) else None
    return [
        path
        for path in paths
        if wanted(path) and not excluded(path) and not kept(path) and (layers is None or layers(path))
    ]


def _selector(value: object, name: str) -> Matches:
    if not value:
        return lambda path: False
    if isinstance(value, str):
        return whole_path(value)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PatternError(f"{name} is neither a pattern nor a list of names")
    names = frozenset(value)
    # A name is a whole path or the end of one, from a dot on.
    return lambda path: not names.isdisjoint(_ends(path))


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _layers(config: Mapping[str, Any]) -> Matches | None:
    """`layers_to_transform` with `layers_pattern`: the first number of a path, or that behind a name."""
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return None
    numbers = {chosen} if isinstance(chosen, int) else set(chosen) if isinstance(chosen, list) else {None}
    if not all(isinstance(number, int) for number in numbers):
        raise PatternError("layers_to_transform is neither a number nor a list of numbers")
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PatternError("layers_pattern is neither a name nor a list of names")
    if odd := [name for name in names if not re.fullmatch(r"\w{1,64}", name)]:
        raise PatternError(f"layers_pattern {odd[0][:60]!r} is no name of a module")

    def inside(path: str) -> bool:
        parts = path.split(".")
        for name, number in pairwise(parts[:-1]):
            if number.isdecimal() and (not names or name in names):
                return int(number) in numbers
        return False

    return inside
