"""One convention for progress: None shows a bar in terminals and notebooks, True always, False never.

Every bar of clipgraft is made here. In a notebook with ipywidgets it is one of the notebook's own,
otherwise a line of text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from clipgraft.errors import ConfigError
from clipgraft.shown import shown_line

if TYPE_CHECKING:
    from tqdm import tqdm

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
    with open_bar(what, unit, shows=progress, leave=False) as bar:

        def tell(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)  # a notebook's bar takes a new length from nothing else
            bar.update(done - bar.n)

        yield tell


def open_bar(
    what: str,
    unit: str,
    total: int | None = None,
    *,
    initial: int = 0,
    shows: bool | None = None,
    leave: bool = True,
) -> tqdm[Any]:
    """Make the bar of a terminal or a notebook; use it as tqdm's, whose arguments these are.

    `shows` is None for a bar where somebody looks, a terminal or a notebook; or a bool.
    """
    disable = None if shows is None else not shows
    kind = _text_bar
    if "ipykernel" in sys.modules:  # a notebook's output is no terminal, and yet it shows bars
        disable = bool(disable)
        kind = _notebook_bar if find_spec("ipywidgets") else _text_bar
    return kind(desc=shown_line(what), unit=unit, total=total, initial=initial, disable=disable, leave=leave)


def _text_bar(**how: Any) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(**how)


def _notebook_bar(**how: Any) -> tqdm[Any]:
    from tqdm.notebook import tqdm

    return tqdm(**how)


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
