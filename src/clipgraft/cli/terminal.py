"""Send log lines and printed text of a command to the terminal, as UTF-8 and without control characters."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from clipgraft.cli.flags.wording import reworded
from clipgraft.shown import ShownFormatter, ShownStream, shown

CELL_PROCESS = "clipgraft sweep cell"
"""Name of the process of a sweep's cell, in which no command runs."""


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:  # Python 3.10 does not know it as a generic class.
    _Handler = logging.StreamHandler


class _Lines(_Handler):
    """A handler that ends the command when its reader is gone, as `print` does."""

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
