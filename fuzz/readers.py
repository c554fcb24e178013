"""Every reader that is fuzzed, by name: how to make its files in a folder that is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fuzz import encoded, runs, tables, weights
from fuzz.subject import Subject

READERS: dict[str, Callable[[Path], Subject]] = {
    **tables.READERS,
    **encoded.READERS,
    **weights.READERS,
    **runs.READERS,
}
