"""Flags of the commands that are about clipgraft itself: `config`, `completion`, `doctor`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipgraft.cli.flags.groups import Group
from clipgraft.options import Options, Positional


class ConfigFlags(Options):
    """Whose options to print."""

    command: Annotated[str | None, Positional()] = Field(
        None, min_length=1, description="command whose options are printed (default: those of every command)"
    )


class CompletionFlags(Options):
    """For which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Positional()] = Field(
        description="shell whose script is printed: bash, zsh or fish"
    )


class DoctorFlags(Options):
    """How to print it."""

    as_json: bool = Field(False, description="print it as JSON")


DOCTOR = Group(DoctorFlags, names={"as_json": "json"})
