"""Tables as text and Markdown, and the numbers in them: units, shares, deviations and intervals."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clipgraft.shown import shown_line

NOTHING = "–"
_GAP = "  "
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
_NUMBER = re.compile(r"([-+−]?\d[\d,]*(?:\.\d+)?%?)((?: .*)?)")


@dataclass(frozen=True)
class Table:
    """Rows of cells that are text already, under a title and column names.

    Attributes:
        title: one line; empty for none.
        columns: column names; empty for a table without a header.
        rows: the cells.
        note: what to know about the numbers, below the rows.
        left: positions of the columns that are aligned to the left, as text is; the others hold numbers.
        keys: how many columns name a row; on a narrow terminal they stand before each block of the others.
        values: what the cells say, for programs; empty where only their text is known.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: tuple[int, ...] = (0,)
    keys: int = 1
    values: tuple[tuple[Any, ...], ...] = ()

    def text(self, width: int | None = None) -> str:
        """Aligned columns; those that do not fit into `width` follow below, beside the key columns again."""
        rows = [*([self.columns] if self.columns else []), *self.rows]
        note = self.note if width is None else textwrap.fill(self.note, width)
        lines = aligned(rows, self.left, width, keys=self.keys)
        return "\n".join([*([self.title] if self.title else []), *lines, *([note] if note else [])])

    def markdown(self) -> str:
        """The title as a heading, and a Markdown table."""
        rule = ["---" if column in self.left else "---:" for column in range(len(self.columns))]
        head = [f"## {self.title}", ""] if self.title else []
        note = ["", self.note] if self.note else []
        return "\n".join([*head, *map(_between_bars, (self.columns, rule, *self.rows)), *note])


@dataclass(frozen=True)
class Column:
    """A column of values: its name, how a value is shown, and whether it is text, aligned to the left."""

    name: str
    show: Callable[[Any], str] = str
    left: bool = False


def table_of(
    title: str, columns: Sequence[Column], values: Iterable[Sequence[Any]], note: str = "", keys: int = 1
) -> Table:
    """Show values by their columns; None is `–`."""
    kept = tuple(tuple(row) for row in values)
    return Table(
        title,
        tuple(column.name for column in columns),
        tuple(
            tuple(
                NOTHING if value is None else column.show(value)
                for value, column in zip(row, columns, strict=True)
            )
            for row in kept
        ),
        note,
        tuple(place for place, column in enumerate(columns) if column.left),
        keys,
        kept,
    )


def aligned(
    rows: Iterable[Sequence[str]],
    left: Sequence[int] = (0,),
    width: int | None = None,
    gap: str = _GAP,
    keys: int = 1,
) -> list[str]:
    """Pad the cells of rows into columns; those in `left` are flush left, the others flush right.

    In a column of numbers, what follows a number (a unit, a deviation, an interval) is flush left, so that
    numbers with and without it stay below each other. Where lines are longer than `width`, the columns that
    do not fit follow in a second block of lines, which begins with the first `keys` columns again.
    """
    lines: list[str] = []
    for block in padded_blocks(rows, left, width, len(gap), keys):
        lines += [""] if lines else []
        lines += [gap.join(row).rstrip() for row in block]
    return lines


def padded_blocks(
    rows: Iterable[Sequence[str]],
    left: Sequence[int] = (0,),
    width: int | None = None,
    gap: int = len(_GAP),
    keys: int = 1,
) -> list[list[tuple[str, ...]]]:
    """The padded cells of `aligned` before they are joined: rows, in blocks that stand below each other."""
    cells = [[shown_line(cell) for cell in row] for row in rows]
    if not cells:
        return []
    padded = [
        _flush_left(column) if place in left else _flush_right(column)
        for place, column in enumerate(zip(*cells, strict=True))
    ]
    widths = [display_width(column[0]) for column in padded]
    return [
        list(zip(*(padded[place] for place in block), strict=True))
        for block in _blocks(widths, width, gap, keys)
    ]


def terminal_width() -> int | None:
    """How many characters a line of the terminal holds; None where standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def display_width(text: str) -> int:
    """How many places of a terminal a text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(_places(character) for character in text)


def with_deviation(value: float, deviation: float | None, digits: int = 1) -> str:
    """`53.1 ± 0.4`; the value alone where there is no deviation."""
    number = f"{value:.{digits}f}"
    return number if deviation is None else f"{number} ± {deviation:.{digits}f}"


def with_interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """A difference with its interval, all with signs: `+3.1 (+1.2 to +5.0)`."""
    number, *ends = (signed(each, digits) for each in (value, low, high))
    return f"{number} ({' to '.join(ends)})"


def signed(value: float, digits: int = 1) -> str:
    """`+3.1`, `-0.4`, and `0.0` without a sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def short(number: float, unit: str = "", billion: str = "G") -> str:
    """1958980000000 -> `1.96 T`; with a unit, `1.96 TMACs`. Numbers of weights say `B` for 10⁹."""
    scale, letter = next((pair for pair in _SCALES if abs(number) >= pair[0]), (1.0, ""))
    letter = billion if letter == "G" else letter
    shown = f"{number / scale:.2f}".rstrip("0").rstrip(".")
    return f"{shown} {letter}{unit}".rstrip()


def count(number: int) -> str:
    """28672 -> `28,672`"""
    return f"{number:,}"


def share(value: float) -> str:
    """0.5312 -> `53.1 %`"""
    return f"{100 * value:.1f} %"


def percent(part: float, whole: float, digits: int = 2) -> str:
    """`3.63%`; of nothing, `0%`."""
    return f"{100 * part / whole if whole else 0:.{digits}f}".rstrip("0").rstrip(".") + "%"


def _flush_left(column: Sequence[str]) -> list[str]:
    width = max(map(display_width, column))
    return [cell + " " * (width - display_width(cell)) for cell in column]


def _flush_right(column: Sequence[str]) -> list[str]:
    parts = [_NUMBER.fullmatch(cell) for cell in column]
    after = max((len(found[2]) for found in parts if found), default=0)
    padded = [
        cell + " " * (after - len(found[2])) if found else cell
        for cell, found in zip(column, parts, strict=True)
    ]
    width = max(map(display_width, padded))
    return [" " * (width - display_width(cell)) + cell for cell in padded]


def _blocks(widths: Sequence[int], most: int | None, gap: int, keys: int) -> list[list[int]]:
    """Positions of the columns that stand beside each other; every block begins with the key columns."""
    named = list(range(min(keys, len(widths))))
    blocks = [list(named)]
    for place in range(len(named), len(widths)):
        taken = sum(widths[column] + gap for column in blocks[-1]) + widths[place]
        if most is not None and taken > most and len(blocks[-1]) > len(named):
            blocks.append(list(named))
        blocks[-1].append(place)
    return blocks


def _places(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _between_bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(shown_line(cell).replace("|", "\\|") for cell in cells) + " |"
