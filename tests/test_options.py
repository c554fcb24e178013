"""Option groups in Python: frozen, checked at once, with errors that name the field."""

from __future__ import annotations

import pickle
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

import clipgraft as cg
from clipgraft.options import Count, Options, Rate, given
from clipgraft.train.fewshot.args import FewShotArgs


class Args(Options):
    """Some options."""

    epochs: Count = Field(32, ge=1, description="passes over the data")
    lr: Rate = Field(5e-4, gt=0, description="learning rate")
    way: Literal["a", "b"] = Field("a", description="one of two")


class Needed(Options):
    """Options without a default."""

    to: Literal["x", "y"] = Field(description="where to")
    name: Annotated[str, Field(description="what it is called")]


def faults(kind: type[Options], **values: object) -> list[str]:
    with pytest.raises(cg.errors.ConfigError) as caught:
        kind(**values)
    return str(caught.value).splitlines()


def test_errors_name_the_field() -> None:
    """A Python user would meet pydantic, or flags of a command line that they do not use."""
    assert faults(Args, epochs="ten") == ["Args: epochs: got 'ten', allowed is a whole number"]


def test_all_faults_come_at_once() -> None:
    """Each fault that is told alone costs another try."""
    told = faults(Args, epochs=0, lr="fast", way="c", epoch=3)
    assert [line.split(": ")[1] for line in told] == ["epochs", "lr", "way", "epoch"]
    assert told[-1] == "Args: epoch: there is no such option (did you mean epochs?)"


def test_missing_options_are_named() -> None:
    """`Field required` says neither what is missing nor what it may be."""
    told = faults(Needed)
    assert told == ["Needed: to is missing: one of 'x', 'y'", "Needed: name is missing: what it is called"]


def test_groups_do_not_change() -> None:
    """What a run records must be what it ran with."""
    with pytest.raises(ValidationError, match="frozen"):
        Args().epochs = 4  # type: ignore[misc]


def test_replace_is_checked_and_remembers_what_was_given() -> None:
    """A default would count as asked for, or a wrong value pass."""
    changed = Args(epochs=3).replace(lr=0.1)
    assert changed == Args(epochs=3, lr=0.1)
    assert changed.model_fields_set == {"epochs", "lr"}
    with pytest.raises(cg.errors.ConfigError, match="Args: epochs: got 0"):
        changed.replace(epochs=0)


def test_check_tells_faults_by_field() -> None:
    """The command line could not put the flag's name in place of the field's."""
    found = Args.check({"epochs": "ten"})
    assert [(fault.field, fault.text) for fault in found] == [
        ("epochs", "got 'ten', allowed is a whole number")
    ]
    assert Args.check({"epochs": "10"}) == Args(epochs=10)


def test_groups_travel_to_other_processes() -> None:
    """Cells of a sweep get their options as bytes."""
    again = pickle.loads(pickle.dumps(Args(epochs=3)))
    assert again == Args(epochs=3)
    assert again.model_fields_set == {"epochs"}


def test_options_as_one_mapping() -> None:
    """A run's record would lack a group."""
    assert given(Args(), Needed(to="x", name="n")) == {
        "epochs": 32,
        "lr": 5e-4,
        "way": "a",
        "to": "x",
        "name": "n",
    }


def test_a_wrong_item_of_a_list_is_one_fault() -> None:
    """Of `--shots 0` a second line says that the list is empty, and numbers of places are shown as keys."""
    faults = FewShotArgs.check({"shots": "1,0", "modes": "clip-lora,tip"})
    assert isinstance(faults, list)
    assert [fault.field for fault in faults] == ["modes", "shots"]
    assert faults[1].text.startswith("got '0', allowed is")
