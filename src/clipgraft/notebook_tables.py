"""Tables as notebooks show them: HTML with small pictures, and data frames.

Cells hold captions and names of strangers: all text is escaped, control and direction characters are written
out, and a picture is decoded and encoded again before it is shown.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from clipgraft.errors import ConfigError, DataError
from clipgraft.shown import shown_line
from clipgraft.text_tables import Table

if TYPE_CHECKING:
    import pandas as pd

SIDE = 96  # pixels of a thumbnail
MOST_PICTURES = 40  # in one table: what is shown is kept in the notebook's file
MOST_BYTES = 1 << 20  # of all pictures of a table
MOST_ROWS = 30
_MOST_CHARACTERS = 400  # of a cell
_INSTALL = "pip install 'clipgraft[notebook]'"
_LEFT, _RIGHT = "text-align:left", "text-align:right"


class Tabled:
    """What notebooks show as a table, and what becomes a data frame: a class says which in `table`."""

    def table(self) -> Table:
        """Return the rows that text, HTML and data frame have in common."""
        raise NotImplementedError

    def head(self) -> tuple[Table, int]:
        """Return a table that has at least the rows that HTML shows, and how many rows there are in all."""
        table = self.table()
        return table, len(table.rows)

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """Return pictures that stand before the rows, by the name of their column; by default none."""
        return {}

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a pandas DataFrame, with numbers as they are, shares as fractions.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame(self.table())

    def _repr_html_(self) -> str:
        # A notebook would show a traceback in place of a result that took hours.
        try:
            return html_table(*self.head(), self.pictures())
        except Exception as error:
            reason = shown_line(str(error), _MOST_CHARACTERS)
            told = f"{type(self).__name__} cannot be shown as a table: {type(error).__name__}: {reason}"
            return f"<p>{escape(told)}</p>"


@dataclass(frozen=True)
class Picture:
    """A small picture in a table.

    Attributes:
        uri: its data; empty where there is none.
        text: what it shows, for those who do not see it.
        reason: why there is none.
    """

    uri: str
    text: str
    reason: str = ""


def small_pictures(
    places: Iterable[tuple[str | None, str]], read: Callable[[str, int], bytes]
) -> tuple[Picture, ...]:
    """Make pictures for a table, up to a number of them and of bytes; those left out say so.

    Args:
        places: where each is, None where there is no picture; and what it shows.
        read: gives a JPEG of at most so many pixels each way of the image at a place, or raises DataError.
    """
    made: list[Picture] = []
    number = size = 0
    for place, text in places:
        if place is None:
            made.append(Picture("", text))
            continue
        if number == MOST_PICTURES or size >= MOST_BYTES:
            made.append(Picture("", text, "left out"))
            continue
        try:
            content = read(place, SIDE)
        except DataError as error:
            made.append(Picture("", text, getattr(error, "reason", str(error))))
            continue
        number, size = number + 1, size + len(content)
        made.append(Picture(jpeg_uri(content), text))
    return tuple(made)


def jpeg_uri(content: bytes) -> str:
    """The bytes of a JPEG as a data URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


def html_table(table: Table, total: int, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The first of `total` rows as HTML without scripts and without a network.

    `pictures` stand in columns of their own, before the others; a row without one in each has an empty cell.
    """
    shown = table.rows[:MOST_ROWS]
    parts = ["<table>"]
    if table.title:
        parts.append(f'<caption style="{_LEFT}">{_text(table.title)}</caption>')
    if table.columns:
        heads = [_cell("th", name, _LEFT) for name in pictures]
        heads += [_cell("th", name, _side(table, place)) for place, name in enumerate(table.columns)]
        parts.append(f"<thead><tr>{''.join(heads)}</tr></thead>")
    parts.append("<tbody>")
    for number, row in enumerate(shown):
        cells = [_picture_cell(column, number) for column in pictures.values()]
        cells += [_cell("td", cell, _side(table, place)) for place, cell in enumerate(row)]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append("</tbody></table>")
    parts += [f"<p>{_text(note)}</p>" for note in _notes(table, total, pictures)]
    return "".join(parts)


def data_frame(table: Table) -> pd.DataFrame:
    """A table as a DataFrame: its values where they are known, otherwise the text of its cells.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError(f"`to_pandas` needs pandas: {_INSTALL}") from error
    return pandas.DataFrame(list(table.values or table.rows), columns=list(table.columns))


def _notes(table: Table, total: int, pictures: Mapping[str, Sequence[Picture]]) -> list[str]:
    notes = [table.note] if table.note else []
    if (more := total - MOST_ROWS) > 0:
        notes.append(f"{more:,} more rows are not shown; `to_pandas()` has them all.")
    rows = [picture for column in pictures.values() for picture in column[:MOST_ROWS]]
    if left_out := sum(picture.reason == "left out" for picture in rows):
        most = f"{MOST_PICTURES} pictures and {MOST_BYTES >> 20} MiB"
        notes.append(f"{left_out:,} pictures are left out: a table shows at most {most} of them.")
    return notes


def _side(table: Table, place: int) -> str:
    return _LEFT if place in table.left else _RIGHT


def _cell(tag: str, text: str, style: str) -> str:
    return f'<{tag} style="{style}">{_text(text)}</{tag}>'


def _text(text: str) -> str:
    return escape(shown_line(text, _MOST_CHARACTERS))


def _picture_cell(column: Sequence[Picture], number: int) -> str:
    picture = column[number] if number < len(column) else Picture("", "")
    if not picture.uri:
        return _cell("td", picture.reason, _LEFT)
    return f'<td style="{_LEFT}"><img src="{picture.uri}" alt="{_text(picture.text)}"></td>'
