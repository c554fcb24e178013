"""`clipgraft config`: what it prints, `--config` reads, and what is printed as a default is the default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipgraft.cli.config import allowed_values, commented_yaml
from clipgraft.cli.declared import declared
from clipgraft.cli.flags.groups import positional_fields
from clipgraft.cli.main import VERBS
from clipgraft.cli.parser import parse
from clipgraft.options import Options

OPTION = re.compile(r"^#([a-z0-9-]+): (.*)$", re.M)
# Values of what a command cannot do without, as YAML.
NEEDED = {"to": "peft", "shell": "bash"}


def printed(verb: str, cli: Any) -> str:
    outcome = cli("config", verb)
    assert (outcome.code, outcome.err) == (0, "")
    return str(outcome.out)


def needed(verb: str) -> dict[str, str]:
    """What the help names without a default."""
    fields = [(name, info) for group in declared(verb) for name, info in group.fields.items()]
    return {name: NEEDED.get(name, "a") for name, info in fields if info.is_required()}


def read(verb: str, text: str, path: Path) -> list[Options]:
    """The options of a command that is given a file."""
    path.write_text(text + "".join(f"\n{name}: {value}" for name, value in needed(verb).items()))
    made: list[Options] = parse(verb, "", declared(verb), ["--config", str(path)])
    return made


@pytest.mark.parametrize("verb", VERBS)
def test_as_it_stands_it_changes_nothing(verb: str, cli: Any, tmp_path: Path) -> None:
    """Who prints the file and gives it, to begin with, has another run than without it."""
    made = read(verb, printed(verb, cli), tmp_path / "a.yaml")
    plain = read(verb, "", tmp_path / "b.yaml")
    assert made == plain
    assert [group.model_fields_set for group in made] == [group.model_fields_set for group in plain]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_there_and_its_default_is_the_default(verb: str, cli: Any, tmp_path: Path) -> None:
    """A line whose # is removed stops the command, or sets another value than was printed."""
    text = printed(verb, cli)
    known = [name for group in declared(verb) for name in group.fields]
    keys = {key.replace("-", "_") for key, _ in OPTION.findall(text)}
    assert keys == {name.rstrip("_") for name in known}
    wanted = [group.model_dump() for group in read(verb, "", tmp_path / "none.yaml")]
    mandatory = {name.replace("_", "-") for name in needed(verb)}
    active = OPTION.sub(lambda line: line[0] if line[1] in mandatory else f"{line[1]}: {line[2]}", text)
    assert len(yaml.safe_load(active) or {}) == len(known) - len(mandatory)
    assert [group.model_dump() for group in read(verb, active, tmp_path / "all.yaml")] == wanted


def test_every_command_at_once(cli: Any) -> None:
    """`clipgraft config` without a command says nothing of some of them, or is no YAML."""
    text = cli("config").out
    assert text.count("\n---\n") + 1 == len(re.findall(r"^# Options of `clipgraft", text, re.M))
    assert set(yaml.safe_load_all(text)) == {None}
    for verb in ("train", "encode", "serve"):
        assert commented_yaml(verb, declared(verb)) in text


@pytest.mark.parametrize(
    ("verb", "name", "allowed"),
    [
        ("train", "loss", "auto, softmax, sigmoid"),
        ("train", "lora_dropout", "a number from 0 to 0.99"),
        ("train", "lora_alpha", "a number from 1e-09 to 1e+06"),
        ("train", "batch_size", "a whole number from 2 to 1e+09"),
        ("train", "val_size", "a number above 0 below 1"),
        ("train", "epochs", "auto, or a whole number"),
        ("train", "use_lora", "true, false"),
        ("train", "model", ""),
        ("search", "k", "a whole number from 1 to 1e+06"),
    ],
)
def test_allowed_values_are_said(verb: str, name: str, allowed: str) -> None:
    """The file tells to try values that are refused."""
    (info,) = [group.fields[name] for group in declared(verb) if name in group.fields]
    assert allowed_values(info) == allowed


def test_an_unknown_command_is_named(cli: Any) -> None:
    """A typo would print a page, or a traceback."""
    outcome = cli("config", "trian")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("clipgraft: COMMAND: there is no command 'trian' (did you mean train?)")


def test_positionals_of_all_commands_are_said_to_be(cli: Any) -> None:
    """OUT looks like a flag, and is none."""
    text = printed("merge", cli)
    for name in positional_fields(declared("merge")):
        assert f"# needed: {name.upper()}, by its place or here\n#{name}: {name.upper()}\n" in text
