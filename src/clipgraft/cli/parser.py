"""Flags from specs: the command line, the YAML file and Python share one declaration and one check."""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from clipgraft.config import Spec, build_specs, flag, read_yaml
from clipgraft.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    """argparse with errors raised instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def parse(verb: str, summary: str, kinds: Sequence[type[Spec]], argv: Sequence[str]) -> list[Any]:
    """The specs of a command from its arguments; `--config` values give way to flags.

    Raises:
        ConfigError: every unknown flag and unusable value, one line each.
    """
    parser = _Parser(f"clipgraft {verb}", description=summary, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="YAML", help="read flags from a file; flags given win")
    for kind in kinds:
        group = parser.add_argument_group((kind.__doc__ or "").split(";")[0].rstrip(".\n").lower())
        for name, info in kind.model_fields.items():
            _add(group, name, info)
    known, unknown = parser.parse_known_args(list(argv))
    values = vars(known)
    config = values.pop("config")
    merged: dict[str, Any] = {} if config is None else read_yaml(config)
    merged.update(values)
    for argument in unknown:
        if not argument.startswith("--"):
            raise ConfigError(f"'{argument}' belongs to no flag; `clipgraft {verb} --help` lists the flags")
        merged[argument.removeprefix("--").partition("=")[0].replace("-", "_")] = None
    return build_specs(list(kinds), merged)


def _add(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    default = "" if info.default in (None, False, {}) else f" (default: {info.default})"
    text = f"{info.description or ''}{default}".replace("%", "%%")
    if info.annotation is bool:
        group.add_argument(
            flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    else:
        group.add_argument(flag(name), default=argparse.SUPPRESS, metavar=_metavar(info), help=text)


def _metavar(info: FieldInfo) -> str:
    kinds = _flatten(info.annotation)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return "{" + ",".join(choices) + "}"
    for kind, label in ((int, "N"), (float, "X"), (Path, "PATH"), (tuple, "A,B"), (dict, "SITES=N,…")):
        if any(found is kind or get_origin(found) is kind for found in kinds):
            return label
    return "TEXT"


def _flatten(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _flatten(part)]
    return [annotation]
