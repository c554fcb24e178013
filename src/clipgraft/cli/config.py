"""`clipgraft config`: every option of a command as commented YAML, which `--config` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from clipgraft.cli.declared import declared
from clipgraft.cli.flags.groups import Group, flag, positional_fields
from clipgraft.cli.flags.shell import ConfigFlags
from clipgraft.cli.main import VERBS
from clipgraft.cli.parser import choices_of, in_help, is_marked, metavar, parse
from clipgraft.cli.terminal import wording
from clipgraft.errors import ConfigError
from clipgraft.options import Repeated, Several, Within, nearest

_SUMMARY = "Print every option of a command as commented YAML: a file of settings to fill in and give to it."
_WIDTH = 100
_HEAD = """\
# Options of `clipgraft {verb}`: {text}.
# Each stands here with its default. Remove the # before a name to set it, and give the file to
#   {line} --config FILE
# Flags on the command line win over the file."""


def run_config(argv: Sequence[str]) -> None:
    """Parse, and print."""
    (spec,) = parse("config", _SUMMARY, [ConfigFlags], argv)
    if spec.command is not None and spec.command not in VERBS:
        close = " or ".join(nearest(spec.command, list(VERBS)))
        hint = f" (did you mean {close}?)" if close else ""
        raise ConfigError(
            f"COMMAND: there is no command '{spec.command}'{hint}; commands are {', '.join(VERBS)}"
        )
    verbs = [spec.command] if spec.command else [verb for verb in VERBS if _takes_options(declared(verb))]
    print("\n\n---\n".join(commented_yaml(verb, declared(verb)) for verb in verbs))


def _takes_options(groups: Sequence[Group]) -> bool:
    return any(group.fields.keys() - positional_fields(groups) for group in groups)


def commented_yaml(verb: str, groups: Sequence[Group]) -> str:
    """YAML in which every option is commented out: what is there acts as if it had been given.

    Commands do tell an option that was given from its default: `--lora-r` without `--use-lora` is a slip.
    So a file that gives all of them would be another command line than an empty one.
    """
    wording.learn(groups)
    places = positional_fields(groups)
    line = " ".join(["clipgraft", verb, *(name.upper() for name in places)])
    blocks = [_HEAD.format(verb=verb, text=VERBS[verb], line=line)]
    heading = ""
    for title, name, info in in_help(groups):
        if title != heading:
            blocks.append(f"# {f' {title} ':-^{_WIDTH - 2}}")
            heading = title
        blocks.append("\n".join(_option(name, info, name in places)))
    return "\n\n".join(blocks)


def _option(name: str, info: FieldInfo, placed: bool) -> Iterator[str]:
    """Yield the lines of an option: what it is, what is allowed, and its default."""
    import textwrap

    about = [wording(info.description or "").rstrip(".")]
    if allowed := allowed_values(info):
        about.append(f"allowed: {allowed}")
    if placed:
        about.append(
            f"needed: {name.upper()}, by its place or here" if info.is_required() else "by its place"
        )
    elif info.is_required():
        about.append("needed")
    for text in about:
        yield from textwrap.wrap(
            text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
    key = flag(name).removeprefix("--")
    yield f"#{key}: {name.upper() if info.is_required() else yaml_value(info.default)}"


def allowed_values(info: FieldInfo) -> str:
    """Return what a field takes, in words: choices, bounds, kind; empty for any text."""
    if info.annotation is bool:
        return "true, false"
    choices, low, high = choices_of(info), *_bounds(info)
    kind = {"N": "a whole number", "X": "a number"}.get(metavar(info).partition("|")[0], "")
    if is_marked(info, Several) or (get_origin(info.annotation) is tuple and not kind):
        kind = "one or several"
    elif is_marked(info, Repeated):
        kind = "a mapping"
    span = " ".join(part for part in (kind, low, high) if part)
    return f"{', '.join(choices)}{f', or {span}' if span else ''}" if choices else span


def _bounds(info: FieldInfo) -> tuple[str, str]:
    """Return the tighter ones of the bounds that the validators of a field have, in words."""
    low: list[tuple[float, str]] = []
    high: list[tuple[float, str]] = []
    for mark in (*info.metadata, *_marks(info.annotation)):
        within = getattr(mark, "func", None)
        if isinstance(within, Within):
            low.append((within.least, "from"))
            high.append((within.most, "to"))
        for name, bounds, word in (("ge", low, "from"), ("gt", low, "above"), ("le", high, "to")):
            if isinstance(value := getattr(mark, name, None), int | float):
                bounds.append((value, word))
        if isinstance(value := getattr(mark, "lt", None), int | float):
            high.append((value, "below"))
    # Of equal bounds the stricter word counts: "above" and "below" come before "from" and "to".
    least = max(low, key=lambda bound: (bound[0], bound[1] == "above"), default=None)
    most = min(high, key=lambda bound: (bound[0], bound[1] == "to"), default=None)
    return tuple("" if b is None else f"{b[1]} {b[0]:g}" for b in (least, most))  # type: ignore[return-value]


def _marks(annotation: Any) -> Iterator[Any]:
    """Yield the validators of the members of a union."""
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
        yield from _marks(get_args(annotation)[0])
    elif get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            if not isinstance(part, str):
                yield from _marks(part)


def yaml_value(default: Any) -> str:
    """Write a default as YAML on one line."""
    from pathlib import PurePath

    from yaml import safe_dump

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, PurePath) else value

    text: str = safe_dump(
        plain(default), default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
