"""Keep the rows of the parts of a data set that the user named, and say which parts there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from clipgraft.errors import DataError

PART = "split"
"""The column, or key of an entry, that tells its part."""


class Parts:
    """Takes rows of the named parts, and counts those of all.

    `split` names parts as the user wrote them: one, or several joined by commas.
    """

    def __init__(self, source: Path, split: str) -> None:
        self._source = source
        self.wanted = [part.strip() for part in split.split(",") if part.strip()]
        self._counts: Counter[str] = Counter()

    def take(self, part: object) -> bool:
        """Count a row of a part, and tell whether it is one of those that are named."""
        name = "" if part is None else str(part).strip()
        self._counts[name] += 1
        return name in self.wanted

    def check(self) -> None:
        """Raise DataError where no row was of one of the parts that are named."""
        for part in self.wanted:
            if part not in self._counts:
                raise unknown_part(self._source, part, self._counts)


def unknown_part(source: Path, given: str, counts: Mapping[str, int], unit: str = "") -> DataError:
    """Make an error for a part that is none of those there are."""
    near = get_close_matches(given, list(counts), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "name one of them"
    return DataError(f'{source}: `split`: no part "{given}"; the parts are: {listed(counts, unit)}; {advice}')


def listed(counts: Mapping[str, int], unit: str = "") -> str:
    """`train (82,783), val (5,000)`, with no more parts than fit a line."""
    ordered = sorted(counts.items(), key=lambda part: -part[1])[:12]
    return ", ".join(f"{name or 'without a name'} ({count:,}{unit})" for name, count in ordered) or "none"
