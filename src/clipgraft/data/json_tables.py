"""JSON files that hold a whole table: a list of objects, image -> captions, or COCO's captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipgraft.data.text_files import text_encoding
from clipgraft.errors import DataError

_KARPATHY = (
    "python -c 'import json; "
    '[print(json.dumps({"image": "/".join(filter(None, (i.get("filepath"), i["filename"]))), '
    '"caption": [s["raw"] for s in i["sentences"]]})) '
    'for i in json.load(open("SOURCE"))["images"] if i["split"] == "train"]\' > train.jsonl'
)


def is_json_lines(source: Path) -> bool:
    """Whether a .json file holds an object a line, as pandas writes with lines=True."""
    with source.open(encoding=text_encoding(source), errors="replace") as file:
        lines = [line for line in (file.readline(1 << 20), file.readline(1 << 20)) if line.strip()]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def json_rows(source: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The rows of a JSON file by their place, each an object, or the reason why there is none.

    Raises:
        DataError: it is no JSON, or of a form that is no table; says how to make one of it.
    """
    try:
        whole = json.loads(source.read_bytes().decode(text_encoding(source)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: is not JSON that can be read ({error}); write it again") from error
    for number, value in enumerate(_entries(source, whole), 1):
        kind = f"is a JSON {type(value).__name__}, not an object"
        yield number, value if isinstance(value, dict) else kind


def _entries(source: Path, whole: Any) -> list[Any]:
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
    """COCO's captions: file names by their id, and an entry for each annotation."""
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
