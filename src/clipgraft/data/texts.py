"""Texts alone: the captions of a table, or the lines of a text file."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from clipgraft.data.delimited import is_token_file
from clipgraft.data.rows import BadRow
from clipgraft.data.table_options import TableOptions
from clipgraft.data.tables import open_table
from clipgraft.data.text_files import text_lines
from clipgraft.errors import DataError

log = logging.getLogger("clipgraft")


def read_texts(
    source: str | Path,
    *,
    dataset_type: str = "auto",
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    quoting: str = "auto",
) -> tuple[str, ...]:
    """The distinct texts of a source, in order; images are not looked at.

    A `.txt` is one text a line, unless it is written like Flickr's captions or one of the options says that
    it is a table; all else is read as tables of pairs are. Rows without a text are skipped, and counted in
    one log line.

    Raises:
        DataError: the source cannot be read, or holds no text.
    """
    source = Path(source)
    options = TableOptions(dataset_type, image_key, caption_key, separator, encoding, quoting)
    named = (image_key, caption_key, separator) != (None, None, None)
    plain = source.suffix.lower() == ".txt" and dataset_type == "auto" and not named
    texts = _lines(source, encoding) if plain and source.is_file() else None
    if texts is None or (texts and is_token_file(source, encoding)):
        texts = _captions(source, options)
    if not texts:
        raise DataError(f"{source}: holds no text; give captions, or a .txt with one text a line")
    return tuple(texts)


def _lines(source: Path, encoding: str | None) -> dict[str, None]:
    with closing(text_lines(source, encoding)) as lines:
        return dict.fromkeys(stripped for line in lines if (stripped := line.strip()))


def _captions(source: Path, options: TableOptions) -> dict[str, None]:
    table = open_table(source, options)
    texts: dict[str, None] = {}
    skipped = 0
    with closing(table.rows()) as rows:
        for row in rows:
            found = [] if isinstance(row, BadRow) else [caption for caption in row.captions if caption]
            skipped += not found
            texts.update(dict.fromkeys(found))
    if skipped:
        log.info("%s: %d %ss without a text were skipped", source, skipped, table.unit)
    return texts
