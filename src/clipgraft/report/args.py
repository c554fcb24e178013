"""Options of publishing."""

from __future__ import annotations

from pydantic import Field

from clipgraft.options import Options, UserPath


class PushArgs(Options):
    """How an adapter is published."""

    private: bool = Field(False, description="make a new repository private")
    license: str | None = Field(
        None, min_length=1, description="licence of the adapter, as the hub spells it, such as apache-2.0"
    )
    full_run: UserPath | None = Field(
        None, description="run that fine-tuned all weights on the same data, for the card's table"
    )
    overwrite: bool = Field(
        False, description="write into a repository that holds other things than an adapter of clipgraft"
    )
