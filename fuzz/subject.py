"""What is fuzzed: a reader, its valid files, and a way to damage one of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

Break = Callable[[Random], None]


@dataclass
class Subject:
    """A reader and its files.

    Attributes:
        folder: where the files are; `home` beside it holds what nobody may touch.
        read: calls the library's door.
        breaks: each breaks a file of the folder.
        names: one of these, or the folder's, is in every message that names its file.
    """

    folder: Path
    read: Callable[[], object]
    breaks: list[Break]
    names: tuple[str, ...] = ()
    _whole: dict[Path, bytes] = field(default_factory=dict)
    _precious: dict[Path, bytes] = field(default_factory=dict)

    def keep(self) -> None:
        """Remember the valid files; call it once before anything is damaged."""
        home = self.folder.parent / "home"
        (home / "index").mkdir(parents=True, exist_ok=True)
        for path in (home / "precious.txt", home / "index" / "precious.txt"):
            path.write_text("precious")
        self._whole, self._precious = contents(self.folder), contents(home)

    def whole(self, name: str) -> bytes:
        """Return the valid bytes of a file."""
        return self._whole[self.folder / name]

    def write(self, name: str, content: bytes) -> None:
        """Write other bytes into a file."""
        (self.folder / name).write_bytes(content)

    def restore(self) -> None:
        """Restore the valid files."""
        for path, content in contents(self.folder).items():
            if path not in self._whole:
                path.unlink()
            elif content != self._whole[path]:
                path.write_bytes(self._whole[path])
        for path, content in self._whole.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def untouched(self) -> bool:
        """Check that everything outside is unchanged; it is restored if not."""
        home = self.folder.parent / "home"
        if contents(home) == self._precious and {p.name for p in home.parent.iterdir()} <= {
            self.folder.name,
            "home",
        }:
            return True
        shutil.rmtree(home, ignore_errors=True)
        for path, content in self._precious.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return False


def contents(folder: Path) -> dict[Path, bytes]:
    """Read every file below a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            found[path] = path.read_bytes()
    return found
