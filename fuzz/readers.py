"""Every fuzzed reader by name, and the function that writes its files into a new folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fuzz import containers, encoded, runs, tables, weights
from fuzz.subject import Subject

READERS: dict[str, Callable[[Path], Subject]] = {
    **tables.READERS,
    **containers.READERS,
    **encoded.READERS,
    **weights.READERS,
    **runs.READERS,
}
