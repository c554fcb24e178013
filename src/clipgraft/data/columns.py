"""Which column holds the image path and which the caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath

from clipgraft.data.images import IMAGE_SUFFIXES
from clipgraft.errors import DataError

IMAGE_FLAG = "--csv-img-key"
CAPTION_FLAG = "--csv-caption-key"
IMAGE_KEY = "filepath"  # open_clip's defaults
CAPTION_KEY = "title"
USUAL_IMAGE_KEYS = (
    "image", "file_name", "path", "filename", "img", "image_path", "file_path", "image_name", "file"
)  # fmt: skip
USUAL_CAPTION_KEYS = ("caption", "text", "captions", "sentence", "sentences", "comment", "description")


@dataclass(frozen=True)
class Keys:
    """The names a user gave, or None where the default or a usual name may be taken."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Columns:
    """The two columns to read, by name, and what to tell the user about the choice."""

    image: str
    caption: str
    notes: tuple[str, ...]


def find_columns(names: Sequence[str], keys: Keys) -> Columns | None:
    """Choose the columns among `names`; None where one of the two is not there."""
    image = _find(names, keys.image, IMAGE_KEY, USUAL_IMAGE_KEYS)
    caption = _find(names, keys.caption, CAPTION_KEY, USUAL_CAPTION_KEYS)
    if image is None or caption is None:
        return None
    chosen = (
        (image, keys.image or IMAGE_KEY, IMAGE_FLAG),
        (caption, keys.caption or CAPTION_KEY, CAPTION_FLAG),
    )
    notes = tuple(
        f'no column "{key}": took "{name}" ({flag} "{name}")' for name, key, flag in chosen if name != key
    )
    return Columns(image, caption, notes)


def missing_columns(source: Path, names: Sequence[str], keys: Keys) -> DataError:
    """The error where `find_columns` found nothing: the flag, the file, its columns, the nearest name."""
    for flag, key, default, usual in (
        (IMAGE_FLAG, keys.image, IMAGE_KEY, USUAL_IMAGE_KEYS),
        (CAPTION_FLAG, keys.caption, CAPTION_KEY, USUAL_CAPTION_KEYS),
    ):
        if _find(names, key, default, usual) is None:
            wanted = key if key is not None else default
            there = ", ".join(f'"{_short(name)}"' for name in names[:12]) + (
                ", ..." if len(names) > 12 else ""
            )
            return DataError(
                f'{source}: {flag}: no column "{wanted}"; it has {there}; {_advice(flag, wanted, names)}'
            )
    raise ValueError("missing_columns called for a table that has both columns")


def _find(names: Sequence[str], key: str | None, default: str, usual: Sequence[str]) -> str | None:
    if key is not None:
        return key if key in names else None
    if default in names:
        return default
    folded = {name.casefold(): name for name in reversed(names)}
    return next((folded[name] for name in (default, *usual) if name in folded), None)


def _advice(flag: str, wanted: str, names: Sequence[str]) -> str:
    if any(PurePath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        return "the first line must be a header that names the columns, such as filepath<TAB>title"
    if len(names) == 1 and any(mark in names[0] for mark in ",;|\t"):
        return "it reads as one column: give the separator with --csv-separator"
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(wanted.casefold(), folded, n=1)
    return f'did you mean "{folded[near[0]]}"?' if near else f"name the right one with {flag}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
