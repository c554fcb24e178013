"""Ask a command for its options without running it: the shell's completion and `clipgraft config` show them.

Every command gives its option groups to `parse`, as the first thing it does. Whoever asks calls the command,
and `parse` answers with the groups instead of reading words. So no list of commands has to be kept beside
the commands themselves.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from clipgraft.cli.main import function_of

if TYPE_CHECKING:
    from clipgraft.cli.flags.groups import Group

_ASKING: ContextVar[bool] = ContextVar("_ASKING", default=False)


class Declared(Exception):  # noqa: N818 - an answer, not an error
    """The answer of a command: its summary and its option groups."""

    def __init__(self, summary: str, groups: list[Group]) -> None:
        super().__init__(summary)
        self.summary = summary
        self.groups = groups


def asked() -> bool:
    """Whether `parse` is to answer with the options instead of reading words."""
    return _ASKING.get()


def declared(verb: str) -> list[Group]:
    """Return the option groups of a command; loads its module, and nothing large."""
    token = _ASKING.set(True)
    try:
        function_of(verb)([])
    except Declared as answer:
        return answer.groups
    finally:
        _ASKING.reset(token)
    raise AssertionError(f"{verb} does not begin with parse()")
