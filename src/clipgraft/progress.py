"""One convention for progress: None shows a bar in terminals and notebooks, True always, False never."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from clipgraft.errors import ConfigError
from clipgraft.shown import shown_line

Told: TypeAlias = Callable[[int, int], None]
Progress: TypeAlias = bool | Told | None


@contextmanager
def showing(progress: Progress, what: str, unit: str = "image") -> Iterator[Told | None]:
    """Yield what is to be told (done, of how many); None where nothing is shown.

    Args:
        progress: None for a bar where the output is a terminal or a notebook, a bool, or what is told.
        what: stands before the bar.
        unit: what is counted.

    Raises:
        ConfigError: `progress` is none of these.
    """
    if progress is False:
        yield None
        return
    if callable(progress):
        yield progress
        return
    if progress is not None and progress is not True:
        raise ConfigError(
            f"progress: got {progress!r}, allowed is None, True, False or a function of (done, total)"
        )
    from tqdm.auto import tqdm

    always = progress or _in_notebook()
    with tqdm(desc=shown_line(what), unit=unit, leave=False, disable=False if always else None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _in_notebook() -> bool:
    """A notebook's output is no terminal, and yet it shows bars."""
    return "ipykernel" in sys.modules


def counting(told: Told | None, total: int) -> Callable[[int], None] | None:
    """From (done, of how many) to what is told how many more are done."""
    if told is None:
        return None
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        told(done, total)

    return advance
