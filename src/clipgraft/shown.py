r"""Text of strangers for terminals, logs and JSON: without control and direction characters.

A caption, a file name or a model's name can hold escape sequences that retitle or clear a terminal, and marks
that turn the order of what follows. Each such character is written as `\u` and four hexadecimal digits: what
JSON itself writes, so that JSON stays JSON and reads back the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

_KEPT = (0x09, 0x0A)  # tabs and the ends of our own lines
_HARMFUL = (
    *(code for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in _KEPT),  # C0, DEL, C1
    0x061C,  # Arabic letter mark
    0x200E,  # marks of direction
    0x200F,
    0x2028,  # separators of lines and paragraphs
    0x2029,
    *range(0x202A, 0x202F),  # embeddings and overrides of direction
    *range(0x2066, 0x206A),  # isolates
)
_ESCAPES = {code: f"\\u{code:04x}" for code in _HARMFUL}


def shown(text: str) -> str:
    """The text with control and direction characters written out; ends of lines and tabs stay."""
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)


def one_line(text: str) -> str:
    """Text whose line ends are written as Python would: a name's must not begin what looks like our line."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def shown_line(text: str, most: int | None = None) -> str:
    """`shown` for what must stay on its line, such as a cell of a table: ends of lines are bars.

    `most` is how many characters of the text are wanted.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}…"
    return shown(" | ".join(text.splitlines()) if "\n" in text or "\r" in text else text).replace("\t", " ")


class ShownFormatter(logging.Formatter):
    """Writes log records without control and direction characters."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):  # paths have no lines; tables that are logged as text have
            record.args = tuple(one_line(str(a)) if isinstance(a, Path) else a for a in record.args)
        return shown(super().format(record))


class ShownStream:
    """A text stream that control and direction characters do not pass; all else is the inner stream's."""

    def __init__(self, inner: TextIO) -> None:
        self.inner = inner

    def write(self, text: str) -> int:
        self.inner.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
