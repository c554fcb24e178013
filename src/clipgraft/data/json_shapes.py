"""Make rows of the JSON forms that data sets come in: COCO, Karpathy, LLaVA, Label Studio, image -> captions.

A whole file that is one object is taken apart by `table_of`; an entry of a list, or of a file with an object
a line, is made a row by the function that `entry_form` finds by the first of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from clipgraft.data.parts import PART, Parts, listed
from clipgraft.errors import DataError

_FILE_KEYS = ("file_name", "filename", "image", "path", "coco_url", "flickr_url")
_CAPTION_KEYS = ("caption", "segment_caption", "captions", "text")
_ANSWERS = ("gpt", "assistant", "model")
_PLACEHOLDERS = ("<image>", "<ImageHere>")
_TEXT_KEYS, _CHOICE_KEYS = ("text",), ("choices", "taxonomy")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of entries.

    Attributes:
        kind: its name for the user.
        row: makes the row of an entry; None where the entry is of no image.
        left_out: what entries without a row are.
    """

    kind: str
    row: Callable[[Entry], Entry | None]
    left_out: str = ""


def table_of(source: Path, whole: Any, split: str | None) -> tuple[str, list[Any]]:
    """Return what a whole JSON file is, and its entries; of Karpathy's, those of the parts in `split`.

    Raises:
        DataError: it is no table, or has parts of which none is named.
    """
    if isinstance(whole, list):
        return "json", whole
    if not isinstance(whole, dict):
        raise DataError(f"{source}: is a single JSON value; write a list of objects with image and caption")
    images, notes = whole.get("images"), whole.get("annotations")
    if isinstance(images, list) and isinstance(notes, list):
        return "json, COCO's captions", _coco(source, images, notes)
    if isinstance(images, list) and any(isinstance(i, dict) and "sentences" in i for i in images[:1]):
        return "json, Karpathy's", _karpathy(source, images, split)
    if whole and all(_is_captions(value) for value in whole.values()):
        return "json", [{"image": name, "caption": value} for name, value in whole.items()]
    keys = ", ".join(list(whole)[:6])
    raise DataError(
        f"{source}: is a JSON object with {keys}, which is no table that is read; write a list of objects "
        "with image and caption (pandas: table.to_json(path, orient='records'))"
    )


def entry_form(head: Sequence[Any]) -> Form | None:
    """Tell the form of entries by the first of them; None where they are rows as they stand."""
    entries = [entry for entry in head if isinstance(entry, dict)]
    if any(isinstance(entry.get("conversations", entry.get("messages")), list) for entry in entries):
        return Form("LLaVA's conversations", _conversation, "entries of text alone, without an image")
    if any(isinstance(e.get("annotations"), list) and isinstance(e.get("data"), dict) for e in entries):
        return Form("Label Studio's", _labelled_task)
    return None


def in_parts(source: Path, entries: Sequence[Any], split: str) -> list[Any]:
    """Return the entries whose `split` is among those named. Raises DataError where one is of no entry."""
    parts = Parts(source, split)
    rows = [entry for entry in entries if isinstance(entry, dict) and PART in entry]
    kept = [entry for entry in rows if parts.take(entry[PART])]
    parts.check()
    return kept


def _is_captions(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def _coco(source: Path, images: list[Any], notes: list[Any]) -> list[Any]:
    """Return an entry for each annotation of COCO's captions, with the file name of its image.

    KTVIC and UIT-ViIC are of this form: with `filename` for `file_name`, and a second caption of segmented
    words, `segment_caption`, beside `caption`.
    """
    known = {str(i["id"]): i for i in images if isinstance(i, dict) and isinstance(i.get("id"), int | str)}
    found = [note for note in notes if isinstance(note, dict)]
    if not any(key in note for note in found for key in _CAPTION_KEYS):
        raise DataError(
            f"{source}: is COCO's JSON without captions, such as instances_…; name the one of captions"
        )
    rows = []
    for note in found:
        image = known.get(str(note.get("image_id")), {})
        texts = {key: note[key] for key in _CAPTION_KEYS if key in note}
        part = {"split": image["split"]} if "split" in image else {}
        rows.append({"image": _file_name(image), **texts, **part})
    return rows


def _file_name(image: Entry) -> Any:
    key = next((key for key in _FILE_KEYS if image.get(key)), None)
    if key is None:
        return None
    name = image[key]
    return (
        unquote(urlsplit(name).path).rpartition("/")[2]
        if key.endswith("_url") and isinstance(name, str)
        else name
    )


def _karpathy(source: Path, images: list[Any], split: str | None) -> list[Any]:
    if split is None:
        counts = Counter(str(image.get("split")) for image in images if isinstance(image, dict))
        raise DataError(
            f"{source}: is Karpathy's JSON, whose parts must not be mixed: {listed(counts)}; name one "
            "with `split` (of validation data: `val_split`), or several joined by commas"
        )
    return [
        {"image": _karpathy_name(image), "caption": [s.get("raw") for s in _objects(image.get("sentences"))]}
        for image in in_parts(source, images, split)
    ]


def _karpathy_name(image: Entry) -> Any:
    folder, name = image.get("filepath"), image.get("filename")
    return f"{folder}/{name}" if isinstance(folder, str) and folder and isinstance(name, str) else name


def _objects(value: Any) -> list[Entry]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _conversation(entry: Entry) -> Entry | None:
    """The answers in a conversation about an image are its captions."""
    several = entry.get("images")
    image = entry.get("image", several[0] if isinstance(several, list) and len(several) == 1 else several)
    if not image:
        return None
    texts = []
    for turn in _objects(entry.get("conversations", entry.get("messages"))):
        text = turn.get("value", turn.get("content"))
        if str(turn.get("from", turn.get("role"))).lower() in _ANSWERS:
            for mark in _PLACEHOLDERS:
                text = text.replace(mark, " ") if isinstance(text, str) else text
            texts.append(text)
    return {**entry, "image": image, "caption": texts}


def _labelled_task(entry: Entry) -> Entry | None:
    """What people wrote or chose for an image in Label Studio, in its export as JSON."""
    data = entry["data"] if isinstance(entry.get("data"), dict) else {}
    texts: list[Any] = []
    labels: list[Any] = []
    named: dict[str, list[Any]] = {}
    for annotation in _objects(entry.get("annotations")):
        if annotation.get("was_cancelled"):
            continue
        for result in _objects(annotation.get("result")):
            value = result["value"] if isinstance(result.get("value"), dict) else {}
            found = _values(value, _TEXT_KEYS)
            texts += found
            chosen = _values(value, _CHOICE_KEYS)
            labels += chosen
            named.setdefault(str(result.get("from_name")), []).extend([*found, *chosen])
    images = [text for key, text in data.items() if isinstance(text, str)]
    image = next((data[key] for key in ("image", "img", "captioning", "image_url") if data.get(key)), None)
    image = image or next(iter(images), None)
    local = {key: _local(text) for key, text in data.items()}
    return {**local, **named, "image": _local(image), "caption": texts, "label": labels}


def _values(value: Entry, keys: Sequence[str]) -> list[Any]:
    found: Any = next((value[key] for key in keys if key in value), [])
    return found if isinstance(found, list) else [found]


def _local(image: Any) -> Any:
    """Take the path out of `/data/local-files/?d=a.jpg` and `/data/upload/1/a.jpg`."""
    if not isinstance(image, str) or not image.startswith("/data/"):
        return image
    parts = urlsplit(image)
    return parse_qs(parts.query).get("d", [unquote(parts.path).removeprefix("/data/")])[0]
