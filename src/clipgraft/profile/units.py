"""Numbers and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def short(number: float, unit: str = "", billion: str = "G") -> str:
    """1958980000000 -> `1.96 T`; with a unit, `1.96 TMACs`. Numbers of weights say `B` for 10⁹."""
    scale, letter = next((pair for pair in _SCALES if abs(number) >= pair[0]), (1.0, ""))
    letter = billion if letter == "G" else letter
    shown = f"{number / scale:.2f}".rstrip("0").rstrip(".")
    return f"{shown} {letter}{unit}".rstrip()


def percent(part: float, whole: float, digits: int = 2) -> str:
    """`3.63%`; of nothing, `0%`."""
    return f"{100 * part / whole if whole else 0:.{digits}f}".rstrip("0").rstrip(".") + "%"


@dataclass(frozen=True)
class Table:
    """Rows under a title; the first column is text, the others are numbers.

    Attributes:
        title: one line.
        columns: names.
        rows: cells as they are shown.
        note: what to know about the numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self) -> str:
        """Aligned columns."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [_aligned(row, widths) for row in cells]
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """A heading and a table."""
        head = [
            f"## {self.title}",
            "",
            _bars(self.columns),
            _bars(("---", *["---:"] * (len(self.columns) - 1))),
        ]
        note = ["", self.note] if self.note else []
        return "\n".join([*head, *map(_bars, self.rows), *note])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *map(str.rjust, row[1:], widths[1:])]).rstrip()


def _bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
