"""From options as the library names them to flags: `` `epochs` `` -> `--epochs`, in errors and log lines.

The library writes an option as in Python, in backticks, since its user may be a program. A command rewrites
the fields of its own option groups; everything else in backticks stays.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Iterable, Iterator
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgraft.cli.flags.groups import AnyGroup


_OPTION = re.compile(r"`([A-Za-z_][A-Za-z0-9_]*)(?:=([^`\n]*))?`")


class Wording:
    """Rewrites names of options in texts; knows the names of no group until it is told of some."""

    def __init__(self) -> None:
        self._flags: dict[str, str] = {}

    def learn(self, kinds: Iterable[AnyGroup]) -> None:
        """Take over the names of a command's groups; of two with the same field the first counts."""
        from clipgraft.cli.flags.groups import grouped  # loads pydantic, which `--help` does without

        for group in grouped(kinds):
            names = getattr(group.kind, "library_names", {})
            for name in group.offered:
                self._flags.setdefault(name, group.label(name))
                self._flags.setdefault(group.named(name), group.label(name))
            known = {name: group.label(field) for name, field in names.items() if field in group.offered}
            self._flags.update({**known, **group.told})

    def forget(self) -> None:
        self._flags.clear()

    def __call__(self, text: str) -> str:
        """The text with `--epochs` for `` `epochs` ``, `--epochs 3` for `` `epochs=3` ``, and so on."""
        return _OPTION.sub(self._reword, text) if "`" in text else text

    def _reword(self, found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if (known := self._flags.get(found[0].strip("`"))) is not None:
            return known
        named = self._flags.get(name) or self._flags.get(f"{name}_")
        if named is None:
            return found[0]
        if value in (None, "True"):
            return named
        if value == "False":
            return f"--no-{named.removeprefix('--')}"
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        return f"{named} {shlex.quote(value[1:-1]) if quoted else value}"


wording = Wording()


class _Rewording(logging.Filter):
    """Rewrites what is logged before any handler sees it, the log of a run folder's included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = wording(str(record.msg))
        if isinstance(record.args, tuple):
            record.args = tuple(map(_reworded, record.args))
        return True


def _reworded(value: Any) -> Any:
    """Text of our own; a path is a stranger's."""
    return value if value is None or isinstance(value, Number | Path) else wording(str(value))


@contextlib.contextmanager
def reworded(log: logging.Logger) -> Iterator[None]:
    """Lines of a logger name flags, those of the groups that `wording` learns meanwhile."""
    rewording = _Rewording()
    log.addFilter(rewording)
    try:
        yield
    finally:
        log.removeFilter(rewording)
        wording.forget()
