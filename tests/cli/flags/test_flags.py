"""Option groups as flags: one declaration of each, explained, bounded and complete."""

from __future__ import annotations

import inspect
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

import clipgraft as cg
from clipgraft.cli.flags import search, shared, tools, training
from clipgraft.cli.flags.groups import build_options, flag
from clipgraft.cli.flags.training import LoraFlags, RunFlags
from clipgraft.data import args as data_args
from clipgraft.options import Options
from clipgraft.train import args
from clipgraft.train.args import TrainArgs

GROUPS = [
    kind
    for module in (shared, training, tools, search, args, data_args)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, Options) and kind.__module__ == module.__name__
]
REQUIRED: dict[type[Options], dict[str, str]] = {
    args.RunArgs: {"out": "a"},
    tools.CompactFlags: {"model": "a", "out": "b"},
    tools.ConvertFlags: {"src": "a", "out": "b", "to": "peft"},
    tools.InspectFlags: {"model": "a"},
    tools.MergeFlags: {"adapters": "a", "out": "b"},
    tools.ProfileFlags: {"model": "a"},
    tools.ExamineFlags: {"source": "a"},
    tools.PushFlags: {"run": "a", "repository": "b/c"},
    tools.ReportFlags: {"runs": "a"},
    search.EncodeFlags: {"source": "a", "out": "b"},
    search.IndexFlags: {"out": "b"},
    tools.MergeFlags: {"adapters": "a", "out": "b"},
    search.SearchFlags: {"out": "b"},
}


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.__name__)
def test_every_flag_is_explained(kind: type[Options]) -> None:
    """`--help` would list a flag without a word on it."""
    assert all(info.description for info in kind.model_fields.values())
    assert kind.__doc__


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.__name__)
def test_defaults_are_valid(kind: type[Options]) -> None:
    """A default that its own check refuses fails for whoever writes it out."""
    spec = kind(**REQUIRED.get(kind, {}))
    assert kind(**spec.model_dump()) == spec


def test_a_field_goes_to_every_spec_that_has_it() -> None:
    """`--seed` would reach the order of batches but not what else is seeded."""
    train, demo = build_options([TrainArgs, tools.DemoFlags], {"seed": 3, "epochs": 2})
    assert (train.seed, demo.seed, train.epochs, demo.epochs) == (3, 3, 2, 2)  # type: ignore[attr-defined]


def test_specs_do_not_change() -> None:
    """What a run records must be what it ran with."""
    with pytest.raises(ValidationError):
        LoraFlags().lora_r = 4  # type: ignore[misc]


def test_faults_of_several_specs_come_together() -> None:
    """Each spec that is checked alone costs the user another run."""
    with pytest.raises(cg.errors.ConfigError) as caught:
        build_options([LoraFlags, TrainArgs, RunFlags], {"lora_r": 0, "lr": 0, "resume": "x", "nmae": "y"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "--nmae",
        "--lora-r",
        "--lr",
        "--resume",
    ]


@given(
    st.dictionaries(
        st.text(max_size=12), st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats())
    )
)
def test_any_settings_give_specs_or_lines(values: dict[str, object]) -> None:
    """A YAML file can hold anything; the user must never meet pydantic."""
    told = "--"
    try:
        build_options([TrainArgs], values)
    except cg.errors.ConfigError as error:
        told = str(error)
    assert all(line.startswith("--") for line in told.splitlines())


def test_flag_spelling() -> None:
    """Messages must name flags as they are typed."""
    assert flag("lock_image_unlocked_groups") == "--lock-image-unlocked-groups"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("wd", 1e30, "from 0 to 1000: with more, weights change their sign"),
        ("eps", 1e-300, "from 1e-37 to 1: less is 0 in fp32"),
        ("epochs", 10**12, "from 1 to 1e+09: with more, the run would not end"),
        ("batch_size", 10**12, "from 0 to 1e+09"),
        ("lora_plus_ratio", 1e30, "from 1 to 10000"),
    ],
)
def test_absurd_numbers_are_refused_with_what_would_come_of_them(name: str, value: float, why: str) -> None:
    """A slip of the keyboard would cost a night, or end with a loss that is nan and advice about --lr."""
    with pytest.raises(cg.errors.ConfigError) as caught:
        build_options([TrainArgs], {name: value})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}: got ")
    assert why in str(caught.value)


# --max-bad-rows without end says: go on, however many; --lora-r is held against the sizes of the sites.
FREE = {"max_bad_rows", "lora_r"}
NUMBERS = [
    (kind, name)
    for kind in GROUPS
    for name, info in kind.model_fields.items()
    if re.search(r"\b(int|float)\b", str(info.annotation)) and name not in FREE
    if not re.search(r"tuple|dict", str(info.annotation))
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda part: getattr(part, "__name__", part))
def test_no_number_is_without_end(kind: type[Options], name: str) -> None:
    """`--k 1e12` or `--cache-gb 1e300` would run out of memory, or long after the slip of the keyboard."""
    with pytest.raises(cg.errors.ConfigError) as caught:
        build_options([kind], {name: 10**40})
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(f"{flag(name)}: got ")]
    assert re.search(r"(from .* to .*: \w.*|less than .*)$", line), line
