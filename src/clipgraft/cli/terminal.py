"""Send log lines and printed text of a command to the terminal: flags for options, plain UTF-8.

The library writes an option as in Python, in backticks, since its user may be a program: `` `epochs` ``. A
command rewrites the fields of its own option groups as flags; everything else in backticks stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from clipgraft.shown import ShownFormatter, ShownStream, shown

if TYPE_CHECKING:
    from clipgraft.cli.flags.groups import AnyGroup

    _Handler = logging.StreamHandler[TextIO]
else:  # Python 3.10 does not know it as a generic class.
    _Handler = logging.StreamHandler

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


def _reword(record: logging.LogRecord) -> bool:
    """Rewrite what is logged before any handler sees it, the log of a run folder's included."""
    record.msg = wording(str(record.msg))
    if isinstance(record.args, tuple):
        record.args = tuple(
            # A path is a stranger's, not text of our own.
            value if value is None or isinstance(value, Number | Path) else wording(str(value))
            for value in record.args
        )
    return True


@contextlib.contextmanager
def reworded(log: logging.Logger) -> Iterator[None]:
    """Lines of a logger name flags, those of the groups that `wording` learns meanwhile."""
    log.addFilter(_reword)
    try:
        yield
    finally:
        log.removeFilter(_reword)
        wording.forget()


class _Lines(_Handler):
    """A handler that ends the command when its reader is gone, as `print` does; warnings have a colour."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            super().emit(record)
            return
        from clipgraft.cli.pretty import NOTE, say

        try:
            say(self.format(record), self.stream, NOTE)
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Print the library's log lines, with flags for options, as UTF-8 whatever the locale says.

    Control characters of names and captions, which are a stranger's, are written out.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    log, outer = logging.getLogger("clipgraft"), sys.stdout
    level, propagate, handler = log.level, log.propagate, _Lines(outer)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **named: shown(plain(*args, **named))
    handler.setFormatter(ShownFormatter())
    sys.stdout = cast(TextIO, ShownStream(outer))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        with reworded(log):
            yield
    finally:
        sys.stdout = outer
        warnings.formatwarning = plain
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep off the terminal what Python prints and logs, as in processes other than rank 0."""
    log = logging.getLogger("clipgraft")
    log.addFilter(_drop)
    try:
        with contextlib.ExitStack() as stack:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        log.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False
