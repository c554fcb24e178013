"""From flat values to specs, all faults at once; and the YAML file that holds such values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from clipgraft.config.fields import Positional, Spec
from clipgraft.errors import ConfigError, together
from clipgraft.yaml_files import load_yaml

S = TypeVar("S", bound=Spec)
_PLAIN = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
}
_LONGEST = 100  # characters of a value in a message
_LONG_NUMBER = 10**100


def flag(field: str) -> str:
    """`lora_r` -> `--lora-r`; `from_`, which Python would take for a keyword without its end, -> `--from`."""
    return f"--{field.rstrip('_').replace('_', '-')}"


def positional_fields(kind: type[Spec]) -> list[str]:
    """The fields of a spec that are given by place, in their order."""
    fields = kind.model_fields.items()
    return [name for name, info in fields if any(isinstance(mark, Positional) for mark in info.metadata)]


def takes_many(kind: type[Spec], name: str) -> bool:
    """Whether a field that is given by place takes all the words that follow."""
    marks = kind.model_fields[name].metadata
    return any(isinstance(mark, Positional) and mark.many for mark in marks)


def build_specs(
    kinds: Sequence[type[S]], values: Mapping[str, Any], unknown_flags: Sequence[str] = ()
) -> list[S]:
    """Specs from flat values, each field going to the specs that have it.

    `unknown_flags`, as they were typed, are reported with the other faults.

    Raises:
        ConfigError: every fault of every spec, one line each: the flag, what was given, what is allowed.
    """
    known = [name for kind in kinds for name in kind.model_fields]
    strange = [*unknown_flags, *(flag(name) for name in values if name not in known)]
    faults = [_unknown(given, known) for given in strange]
    specs: list[S] = []
    for kind in kinds:
        try:
            specs.append(kind(**{name: values[name] for name in kind.model_fields if name in values}))
        except ValidationError as error:
            faults.extend(_fault(kind, item) for item in error.errors())
    if faults:
        raise together(faults)
    return specs


def _unknown(given: str, known: Sequence[str]) -> str:
    name = given.lstrip("-").replace("-", "_").lower()
    close = [name] if name in known else difflib.get_close_matches(name, known, n=2)
    hint = f" (did you mean {' or '.join(map(flag, close))}?)" if close else ""
    shown = given if given.isprintable() else repr(given)[1:-1]
    return f"{shown}: there is no such flag{hint}"


def _fault(kind: type[Spec], item: Any) -> str:
    where, message = item["loc"], item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    name = str(where[0])
    label = name.upper() if name in positional_fields(kind) else flag(name)
    if item["type"] == "missing":
        choices = [c for c in get_args(kind.model_fields[name].annotation) if isinstance(c, str)]
        return f"{label} is missing: " + (
            f"one of {', '.join(map(repr, choices))}" if choices else f"{kind.model_fields[name].description}"
        )
    message = _PLAIN.get(item["type"], message.replace("String should have", "text with"))
    if item["type"] == "literal_error":
        message = f"one of {item['ctx']['expected']}"
    key = f" at '{where[1]}'" if len(where) > 1 else ""
    return f"{label}: got {_short(item['input'])}{key}, allowed is {message}"


def _short(given: Any) -> str:
    """What was given as Python writes it, cut to what fits into a line."""
    if isinstance(given, int) and abs(given) >= _LONG_NUMBER:
        return "a number of more than 100 digits"
    told = repr(given)
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 1]}…"


def read_yaml(path: Path) -> dict[str, Any]:
    """Flat settings of a `--config` file, keys in flag or field spelling.

    Raises:
        ConfigError: no such file, no YAML, or not a flat mapping.
    """
    from yaml import SafeLoader

    loaded = load_yaml(path, SafeLoader, ConfigError, f"--config {path}")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config {path}: write one 'flag: value' a line")
    named: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).removeprefix("--").replace("-", "_")
        name = f"{name}_" if iskeyword(name) else name
        if name in named:
            raise ConfigError(f"--config {path}: {flag(name)} is there twice; keep one of them")
        named[name] = value
    return named
