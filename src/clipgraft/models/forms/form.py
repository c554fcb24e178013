"""What one form of a whole model is: how it is written, and by which names it is known again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

from clipgraft.models.clip import Clip

Gate: TypeAlias = Callable[[Path], Mapping[str, Any]]
"""Judges a finished folder before anybody sees it: returns what to record, or raises what refuses it."""
Differences: TypeAlias = dict[str, float]
"""Of each file, how far its features are from PyTorch's: the largest difference over the largest feature."""


@dataclass(frozen=True)
class Job:
    """One writing of a model.

    Attributes:
        clip: the model, without adapters.
        target: an empty folder that gets its final name once the job is done; or the final name of a file.
        tell: is told each step in a line.
        gate: judges a form that only approximates the model.
    """

    clip: Clip
    target: Path
    tell: Callable[[str], None]
    gate: Gate | None = None


@dataclass(frozen=True)
class FormSpec:
    """A form.

    Attributes:
        write: writes it; returns differences where it measures any.
        steps: how many lines `write` tells at most.
        marker: the file by which an earlier folder of this form is known; "" for a form that is a file.
        files: patterns of everything else in the folder, `folder/name` for what lies one deeper.
        suffixes: endings of the output's name for which it is one file.
        write_file: writes that file.
        require: raises ModelError where a package is missing.
    """

    write: Callable[[Job], Differences] | None
    steps: int
    marker: str = ""
    files: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    write_file: Callable[[Job], None] | None = None
    require: Callable[[], None] = lambda: None

    def is_file(self, out: Path) -> bool:
        """Whether this form is one file under that name."""
        return out.suffix in self.suffixes

    def foreign(self, folder: Path) -> list[str]:
        """Names in a folder that no writing of this form made, in order."""
        inner = {pattern.split("/")[0] for pattern in self.files if "/" in pattern}
        found = []
        for path in sorted(folder.iterdir()):
            names = [path.name]
            if path.is_dir() and path.name in inner:
                names = [f"{path.name}/{child.name}" for child in sorted(path.iterdir())]
            found += [name for name in names if not self._knows(name)]
        return found

    def _knows(self, name: str) -> bool:
        known = (self.marker, *self.files)
        return any(name.count("/") == one.count("/") and fnmatch(name, one) for one in known)


TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def inside(folder: str, *patterns: str) -> tuple[str, ...]:
    """The same patterns for what lies in a folder of the output."""
    return tuple(f"{folder}/{pattern}" for pattern in patterns)
