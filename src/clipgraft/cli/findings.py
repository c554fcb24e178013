"""What a look of `clipgraft doctor` gives: a line for people and programs, and whether it is bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, and what was found.

    Attributes:
        name: what was looked at.
        text: what was found.
        state: broken for what clipgraft cannot do without, missing for what some commands need.
        numbers: the same for programs.
    """

    name: str
    text: str
    state: State = "ok"
    numbers: Mapping[str, float | str | None] = field(default_factory=dict)

    def rewritten(self, change: Callable[[str], str]) -> Finding:
        """The finding with all its texts changed."""
        numbers = {name: change(v) if isinstance(v, str) else v for name, v in self.numbers.items()}
        return replace(self, text=change(self.text), numbers=numbers)


def attempt(name: str, look: Callable[[], Finding | list[Finding]], necessary: bool = False) -> list[Finding]:
    """Look; an error of any kind is a finding, too."""
    try:
        found = look()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Finding(name, f"cannot be told: {reason[:200]}", "broken" if necessary else "missing")]
    return found if isinstance(found, list) else [found]


def format_bytes(size: float) -> str:
    """Return `1.2 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
