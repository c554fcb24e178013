"""Which column holds the image path and which the caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath

from clipgraft.errors import DataError
from clipgraft.pictures import IMAGE_SUFFIXES
from clipgraft.shown import shown_line


@dataclass(frozen=True)
class _Role:
    """What a column is for: the flag that names it, open_clip's default name, and the names others use."""

    flag: str
    default: str
    usual: tuple[str, ...]


_IMAGE = _Role(
    "--csv-img-key",
    "filepath",
    ("image", "file_name", "path", "filename", "img", "image_path", "file_path", "image_name", "file"),
)
_CAPTION = _Role(
    "--csv-caption-key",
    "title",
    ("caption", "text", "captions", "sentence", "sentences", "comment", "description"),
)


_NUMBERED = re.compile(r"(caption|title|text|sentence|description|comment)[ _-]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Keys:
    """The names a user gave, or None where the default or a usual name may be taken."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns to read, by name, and the flags that would have named those that were guessed."""

    image: str
    captions: tuple[str, ...]
    guessed: tuple[str, ...]


def find_columns(names: Sequence[str], keys: Keys) -> Columns | None:
    """Choose the columns among `names`; None where one of the two is not there."""
    image, captions = _find(names, keys.image, _IMAGE), caption_columns(names, keys.caption)
    if image is None or not captions:
        return None
    guessed = [f'{_IMAGE.flag} "{image}"'] if image not in (keys.image, _IMAGE.default) else []
    if keys.caption is None and captions != (_CAPTION.default,):
        guessed.append(f'{_CAPTION.flag} "{",".join(captions)}"')
    return Columns(image, captions, tuple(guessed))


def image_column(names: Sequence[str], key: str | None = None) -> str | None:
    """The column of image paths alone; None where it is not there."""
    return _find(names, key, _IMAGE)


def caption_columns(names: Sequence[str], key: str | None = None) -> tuple[str, ...]:
    """The columns of captions: those of a list by commas, one of a usual name, or `caption_0` and on."""
    found = _find(names, key, _CAPTION)
    if found is not None:
        return (found,)
    if key is not None:
        parts = tuple(part.strip() for part in key.split(","))
        return parts if len(parts) > 1 and all(part in names for part in parts) else ()
    return tuple(name for name in names if _NUMBERED.fullmatch(name))


def by_number(keys: Keys, width: int) -> Columns | None:
    """The columns that keys name by their numbers from 1, as the names `1`, `2` and on; None for others."""
    parts = [keys.image or "", *(keys.caption or "").split(",")]
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(numbers) < len(parts) or not all(1 <= number <= width for number in numbers):
        return None
    return Columns(str(numbers[0]), tuple(str(number) for number in numbers[1:]), ())


def guess_notes(guessed: Sequence[str]) -> tuple[str, ...]:
    """What to tell the user about names or a separator other than open_clip's defaults: the flags to give."""
    return (f"guessed from the header: {' '.join(guessed)}",) if guessed else ()


def missing_columns(source: Path, names: Sequence[str], keys: Keys) -> DataError:
    """The error where `find_columns` found nothing: the flag, the file, its columns, the nearest name."""
    role, key = (_CAPTION, keys.caption) if _find(names, keys.image, _IMAGE) else (_IMAGE, keys.image)
    wanted = role.default if key is None else key
    if role is _CAPTION and "," in wanted:
        wanted = next((part.strip() for part in wanted.split(",") if part.strip() not in names), wanted)
    there = ", ".join(f'"{_short(name)}"' for name in names[:12]) + (", ..." if len(names) > 12 else "")
    advice = _advice(role.flag, wanted, names)
    return DataError(f'{source}: {role.flag}: no column "{wanted}"; it has {there}; {advice}')


def _find(names: Sequence[str], key: str | None, role: _Role) -> str | None:
    if key is not None:
        return key if key in names else None
    folded = {name.casefold(): name for name in reversed(names)}
    return next((folded[name] for name in (role.default, *role.usual) if name in folded), None)


def _advice(flag: str, wanted: str, names: Sequence[str]) -> str:
    if any(PurePath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        return (
            "the first line must be a header that names the columns, such as filepath<TAB>title; or give "
            f"their numbers from 1: {_IMAGE.flag} 1 {_CAPTION.flag} 2"
        )
    if len(names) == 1 and any(mark in names[0] for mark in ",;|\t"):
        return "it reads as one column: give the separator with --csv-separator"
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(wanted.casefold(), folded, n=1)
    return f'did you mean "{_short(folded[near[0]])}"?' if near else f"name the right one with {flag}"


def _short(name: str) -> str:
    """A column's name in a message: a stranger's, which may hold line breaks."""
    short = name if len(name) <= 40 else name[:37] + "..."
    return shown_line(short)
