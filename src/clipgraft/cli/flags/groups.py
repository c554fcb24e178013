"""From option groups to flags and back: names, values, faults, and the YAML file that holds values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from clipgraft.errors import ConfigError, together
from clipgraft.options import Fault, Options, Positional, PythonOnly, nearest
from clipgraft.readers import load_yaml


@dataclass(frozen=True)
class Group:
    """An option group as a command takes it.

    Attributes:
        kind: the option group.
        prefix: what stands before each of its fields: `r` of a group with the prefix `lora_` is `--lora-r`.
        names: flags of single fields, in field spelling, where prefix and field do not make them.
        without: fields that the command does not offer, besides those marked `PythonOnly`.
        told: how messages name what is an option in Python alone, such as `out` -> `--name`.
        fixed: values of fields that the command does not offer.
    """

    kind: type[Options]
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    told: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The fields that the command offers, by the names of their flags in field spelling."""
        return {self.named(name): self.kind.model_fields[name] for name in self.offered}

    @property
    def offered(self) -> list[str]:
        """The names of these fields in Python."""
        infos = self.kind.model_fields.items()
        return [name for name, info in infos if name not in self.without and not _python_only(info)]

    def named(self, name: str) -> str:
        """The flag of a field in field spelling: `r` -> `lora_r`."""
        return self.names.get(name, f"{self.prefix}{name}")

    def label(self, name: str) -> str:
        """How messages name a field: `--lora-r`, or OUT for one that is given by its place."""
        named = self.named(name)
        return named.upper() if _mark(self.kind.model_fields[name]) else flag(named)


AnyGroup = type[Options] | Group


def grouped(kinds: Iterable[AnyGroup]) -> list[Group]:
    """Option groups as a command takes them; a class stands for all its fields under their own names."""
    return [kind if isinstance(kind, Group) else Group(kind) for kind in kinds]


def flag(name: str) -> str:
    """`lora_r` -> `--lora-r`; `from_`, which Python would take for a keyword without its end, -> `--from`."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def positional_fields(kinds: Iterable[AnyGroup]) -> dict[str, bool]:
    """The fields that are given by place, in their order; True for one that takes all words that follow."""
    fields = {name: info for group in grouped(kinds) for name, info in group.fields.items()}
    return {name: mark.many for name, info in fields.items() if (mark := _mark(info)) is not None}


def _python_only(info: FieldInfo) -> bool:
    return any(isinstance(mark, PythonOnly) for mark in info.metadata)


def _mark(info: FieldInfo) -> Positional | None:
    return next((mark for mark in info.metadata if isinstance(mark, Positional)), None)


def build_options(
    kinds: Sequence[AnyGroup], values: Mapping[str, Any], unknown_flags: Sequence[str] = ()
) -> list[Any]:
    """Option groups from flat values, each value going to the groups that have it.

    `unknown_flags`, as they were typed, are reported with the other faults.

    Raises:
        ConfigError: every fault of every group, one line each: the flag, what was given, what is allowed.
    """
    groups = grouped(kinds)
    known = {group.named(name): group.label(name) for group in groups for name in group.offered}
    strange = [*unknown_flags, *(flag(name) for name in values if name not in known)]
    faults = [_unknown(given, known) for given in strange]
    made: list[Options] = []
    for group in groups:
        own = {name: values[group.named(name)] for name in group.offered if group.named(name) in values}
        found = group.kind.check({**group.fixed, **own})
        if isinstance(found, Options):
            made.append(found)
        else:
            faults += map(partial(_told, group), found)
    if faults:
        raise together(faults)
    return made


def recorded(kinds: Sequence[AnyGroup], made: Sequence[Options]) -> dict[str, Any]:
    """The values of a command's flags by their names, as the records of runs and sweeps have them."""
    return {
        group.named(name).rstrip("_"): getattr(options, name)
        for group, options in zip(grouped(kinds), made, strict=True)
        for name in group.offered
    }


def _told(group: Group, fault: Fault) -> str:
    joint = " " if fault.text.startswith("is missing") else ": "
    return f"{group.label(fault.field)}{joint}{fault.text}"


def _unknown(given: str, known: Mapping[str, str]) -> str:
    close = [known[name] for name in nearest(given.lstrip("-").replace("-", "_").lower(), list(known))]
    close = [label if label.startswith("-") else f"{label}, which takes no flag" for label in close]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    shown = given if given.isprintable() else repr(given)[1:-1]
    return f"{shown}: there is no such flag{hint}"


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
