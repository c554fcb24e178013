"""Read JSON Lines, and JSON files that hold a whole table in one of the forms of `json_shapes`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.json_shapes import Form, entry_form, in_parts, table_of
from clipgraft.data.table import BadRow, Cells, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.data.text_files import text_encoding, text_lines
from clipgraft.errors import DataError

_Objects = Iterator[tuple[int, dict[str, Any] | str]]  # numbers with objects, or with why there is none

_HEAD = 20  # objects that are looked at to learn which keys there are


def open_json(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open a file with a JSON object a line, or a `.json` with a whole table in one of the usual forms.

    Raises:
        DataError: it is no JSON, of another form, or lacks a column or the part that `split` names.
    """
    whole = source.suffix.lower() == ".json" and not _is_json_lines(source)
    plain = partial(_entries, source, args.split) if whole else partial(_lines, source, args.csv_encoding)
    kind, unit = (_read_table(source, args.split)[0], "entry") if whole else ("jsonl", "line")
    form = entry_form([value for _, value in islice(plain(), _HEAD)])
    left_out: Counter[str] = Counter()
    objects = plain if form is None else partial(_formed, plain, form, left_out)
    if args.split is not None and not kind.endswith("Karpathy's"):
        objects = partial(_part, source, objects, args.split)
    names = _names(source, objects())
    _, columns = choose_columns(source, [Header(names)], args, wanted)
    wanted_names = (names[columns.image], *(names[place] for place in columns.texts))
    return Table(
        source,
        source.parent,
        kind if form is None else f"{kind}, {form.kind}",
        unit,
        partial(_rows, objects, wanted_names, wanted.cells(args)),
        columns.notes,
        columns.has_texts,
        has_images=columns.has_images,
        met=lambda: tuple(f"{count:,} {what}: left out" for what, count in left_out.items()),
    )


def _formed(plain: Callable[[], _Objects], form: Form, left_out: Counter[str]) -> _Objects:
    """Make rows of entries of one form, and count those that are of no image."""
    left_out.clear()
    for number, value in plain():
        row = form.row(value) if isinstance(value, dict) else value
        if row is None:
            left_out[form.left_out] += 1
        else:
            yield number, row


def _part(source: Path, objects: Callable[[], _Objects], split: str) -> _Objects:
    """Keep the entries of the parts that are named, and those that cannot be read."""
    found = list(objects())
    kept = {id(entry) for entry in in_parts(source, [value for _, value in found], split)}
    yield from ((number, value) for number, value in found if isinstance(value, str) or id(value) in kept)


def flat(cells: list[Any]) -> Any:
    """Join the captions of several columns into one list; those of one column stay as they are."""
    if len(cells) == 1:
        return cells[0]
    return [text for cell in cells for text in (cell if isinstance(cell, list | tuple) else [cell])]


def _names(source: Path, objects: _Objects) -> tuple[str, ...]:
    head = [value for _, value in islice(objects, _HEAD)]
    found = [value for value in head if isinstance(value, dict)]
    if not found:
        wrong = f"its first line {head[0]}" if head else "the file is empty"
        raise DataError(
            f'{source}: {wrong}; each line must be like {{"filepath": "a.jpg", "title": "a dog"}}'
        )
    return tuple(dict.fromkeys(name for value in found for name in value))


def _rows(objects: Callable[[], _Objects], names: tuple[str, ...], cells: Cells) -> Rows:
    image, *texts = names
    for number, value in objects():
        if isinstance(value, str):
            yield BadRow(number, "", value)
        else:
            yield make_row(number, value.get(image), flat([value.get(name) for name in texts]), cells)


def _lines(source: Path, encoding: str | None) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """Yield the object of every line that is not blank, or the reason why there is none."""
    with closing(text_lines(source, encoding)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"is not JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON that can be read: {error}"
            else:
                yield number, value if isinstance(value, dict) else _no_object(value)


def _no_object(value: Any) -> str:
    return f"is a JSON {type(value).__name__}, not an object"


def _is_json_lines(source: Path) -> bool:
    """Tell whether a .json file holds an object a line, as pandas writes with lines=True."""
    with source.open(encoding=text_encoding(source), errors="replace") as file:
        lines = [line for line in (file.readline(1 << 20), file.readline(1 << 20)) if line.strip()]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _entries(source: Path, split: str | None) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """Yield the rows of a JSON file by their place: objects, or the reason why there is none."""
    for number, value in enumerate(_read_table(source, split)[1], 1):
        yield number, value if isinstance(value, dict) else _no_object(value)


def _read_table(source: Path, split: str | None) -> tuple[str, list[Any]]:
    try:
        whole = json.loads(source.read_bytes().decode(text_encoding(source)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: is not JSON that can be read ({error}); write it again") from error
    return table_of(source, whole, split)
