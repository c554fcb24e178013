"""Read JSON Lines, and JSON files that hold a whole table: objects, image -> captions, or COCO."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipgraft.data.args import TableArgs
from clipgraft.data.table import BadRow, Cells, Header, Rows, Table, Wanted, choose_columns, make_row
from clipgraft.data.text_files import text_encoding, text_lines
from clipgraft.errors import DataError

_Objects = Iterator[tuple[int, dict[str, Any] | str]]  # numbers with objects, or with why there is none

_HEAD = 20  # objects that are looked at to learn which keys there are
_KARPATHY = (
    "python -c 'import json; "
    '[print(json.dumps({"image": "/".join(filter(None, (i.get("filepath"), i["filename"]))), '
    '"caption": [s["raw"] for s in i["sentences"]]})) '
    'for i in json.load(open("SOURCE"))["images"] if i["split"] == "train"]\' > train.jsonl'
)


def open_json(source: Path, args: TableArgs, wanted: Wanted) -> Table:
    """Open a file with a JSON object a line, or a `.json` with a whole table in one of the usual forms."""
    if source.suffix.lower() == ".json" and not _is_json_lines(source):
        kind, unit, objects = "json", "entry", partial(_entries, source)
    else:
        kind, unit, objects = "jsonl", "line", partial(_lines, source, args.csv_encoding)
    names = _names(source, objects())
    _, columns = choose_columns(source, [Header(names)], args, wanted)
    wanted_names = (names[columns.image], *(names[place] for place in columns.texts))
    rows = partial(_rows, objects, wanted_names, wanted.cells(args))
    return Table(
        source,
        source.parent,
        kind,
        unit,
        rows,
        columns.notes,
        columns.has_texts,
        has_images=columns.has_images,
    )


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


def _entries(source: Path) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """Yield the rows of a JSON file by their place: objects, or the reason why there is none.

    Raises:
        DataError: it is no JSON, or of a form that is no table; says how to make one of it.
    """
    try:
        whole = json.loads(source.read_bytes().decode(text_encoding(source)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: is not JSON that can be read ({error}); write it again") from error
    for number, value in enumerate(_table(source, whole), 1):
        yield number, value if isinstance(value, dict) else _no_object(value)


def _table(source: Path, whole: Any) -> list[Any]:
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise DataError(f"{source}: is a single JSON value; write a list of objects with image and caption")
    images, notes = whole.get("images"), whole.get("annotations")
    if isinstance(images, list) and isinstance(notes, list):
        return _coco(source, images, notes)
    if isinstance(images, list) and any(isinstance(i, dict) and "sentences" in i for i in images[:1]):
        advice = _KARPATHY.replace("SOURCE", source.name)
        raise DataError(
            f"{source}: is Karpathy's JSON, whose parts (train, val, test) must not be mixed; write each "
            f"apart: {advice}"
        )
    if whole and all(_is_captions(value) for value in whole.values()):
        return [{"image": name, "caption": value} for name, value in whole.items()]
    keys = ", ".join(list(whole)[:6])
    raise DataError(
        f"{source}: is a JSON object with {keys}, which is no table that is read; write a list of objects "
        "with image and caption (pandas: table.to_json(path, orient='records'))"
    )


def _is_captions(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def _coco(source: Path, images: list[Any], notes: list[Any]) -> list[Any]:
    """Return an entry for each annotation of COCO's captions, with the file name of its image."""
    names = {
        image.get("id"): image.get("file_name")
        for image in images
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }
    found = [note for note in notes if isinstance(note, dict)]
    if not any("caption" in note for note in found):
        raise DataError(
            f"{source}: is COCO's JSON without captions, such as instances_…; name the one of captions"
        )
    return [{"image": _name_of(note, names), "caption": note.get("caption")} for note in found]


def _name_of(note: dict[str, Any], names: dict[Any, Any]) -> Any:
    key = note.get("image_id")
    return names.get(key) if isinstance(key, int | str) else None
