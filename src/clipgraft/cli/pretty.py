"""Decide where output is for eyes: a terminal gets tables and colours by `rich`, all else plain text.

What is piped, redirected or captured is the same bytes whatever is installed here, so that scripts can read
it. The text is made harmless before `rich` sees it: commands print through a stream that writes escape
sequences out, and only what is made here goes around that.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, TextIO

from clipgraft.shown import ShownStream, shown
from clipgraft.text_tables import Table, padded_blocks, terminal_width

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

BAD, NOTE, HEAD, FAINT = "bold red", "yellow", "bold cyan", "dim"


def is_pretty(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands more than text."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown") and _has_rich()


@cache
def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def show(*parts: Table | str, gap: int = 1) -> None:
    """Print texts and tables below each other, with empty lines between them.

    Args:
        parts: texts as they stand, and tables.
        gap: the number of empty lines.
    """
    if not is_pretty(sys.stdout):
        width = terminal_width()
        texts = (part if isinstance(part, str) else part.text(width) for part in parts)
        print(("\n" * (gap + 1)).join(texts))
        return
    for number, part in enumerate(parts):
        if number and gap:
            print("\n" * gap, end="")
        if isinstance(part, str):
            print(part)
        else:
            sys.stdout.flush()
            _draw(part, _console(_terminal(sys.stdout)))


def say(text: str, stream: TextIO, style: str, mark: str = "") -> None:
    """Print a line: its `mark`, or all of it, in a style where the stream is a terminal."""
    if not is_pretty(stream):
        print(f"{mark}{text}", file=stream)
        return
    from rich.text import Text

    line = Text.assemble((mark, style), shown(text)) if mark else Text(shown(text), style)
    _console(_terminal(stream)).print(line, soft_wrap=True)


def _terminal(stream: TextIO) -> TextIO:
    """The stream below ours, which lets escape sequences pass."""
    return stream.inner if isinstance(stream, ShownStream) else stream


def _console(stream: TextIO) -> Console:
    """A console that takes no text for markup, numbers or emoji; it reads NO_COLOR itself."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _draw(table: Table, console: Console) -> None:
    """Print a table in the blocks that the plain text has, too, with its header in bold."""
    from rich.text import Text

    if table.title:
        console.print(Text(shown(table.title), HEAD), soft_wrap=True)
    rows = [*([table.columns] if table.columns else []), *table.rows]
    for number, block in enumerate(padded_blocks(rows, table.left, console.width, keys=table.keys)):
        if number:
            console.print()
        console.print(_rich_table(block, bool(table.columns)), soft_wrap=False)
    if table.note:
        console.print(Text(shown(table.note), FAINT))


def _rich_table(block: list[tuple[str, ...]], with_head: bool) -> RichTable:
    """The cells are padded already: numbers below each other, units and intervals beside them."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        box=box.SIMPLE_HEAD if with_head else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0) if with_head else (0, 2, 0, 0),  # the box has one more character
        show_header=with_head,
        header_style="bold",
    )
    head, *rest = block if with_head else [("",) * len(block[0]), *block]
    for name in head:
        made.add_column(Text(name), no_wrap=True, overflow="fold")
    for row in rest:
        made.add_row(*map(Text, row))
    return made
