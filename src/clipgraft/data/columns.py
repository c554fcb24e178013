"""Which column holds the image path and which the caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath

from clipgraft.data.images import IMAGE_SUFFIXES
from clipgraft.errors import DataError


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


@dataclass(frozen=True)
class Keys:
    """The names a user gave, or None where the default or a usual name may be taken."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Columns:
    """The two columns to read, by name, and the flags that would have named those that had to be guessed."""

    image: str
    caption: str
    guessed: tuple[str, ...]


def find_columns(names: Sequence[str], keys: Keys) -> Columns | None:
    """Choose the columns among `names`; None where one of the two is not there."""
    image = _find(names, keys.image, _IMAGE)
    caption = _find(names, keys.caption, _CAPTION)
    if image is None or caption is None:
        return None
    chosen = ((image, keys.image, _IMAGE), (caption, keys.caption, _CAPTION))
    guessed = (f'{role.flag} "{name}"' for name, key, role in chosen if name not in (key, role.default))
    return Columns(image, caption, tuple(guessed))


def image_column(names: Sequence[str], key: str | None = None) -> str | None:
    """The column of image paths alone; None where it is not there."""
    return _find(names, key, _IMAGE)


def caption_column(names: Sequence[str], key: str | None = None) -> str | None:
    """The column of captions alone; None where it is not there."""
    return _find(names, key, _CAPTION)


def guess_notes(guessed: Sequence[str]) -> tuple[str, ...]:
    """What to tell the user about names or a separator other than open_clip's defaults: the flags to give."""
    return (f"guessed from the header: {' '.join(guessed)}",) if guessed else ()


def missing_columns(source: Path, names: Sequence[str], keys: Keys) -> DataError:
    """The error where `find_columns` found nothing: the flag, the file, its columns, the nearest name."""
    role, key = (_CAPTION, keys.caption) if _find(names, keys.image, _IMAGE) else (_IMAGE, keys.image)
    wanted = role.default if key is None else key
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
        return "the first line must be a header that names the columns, such as filepath<TAB>title"
    if len(names) == 1 and any(mark in names[0] for mark in ",;|\t"):
        return "it reads as one column: give the separator with --csv-separator"
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(wanted.casefold(), folded, n=1)
    return f'did you mean "{folded[near[0]]}"?' if near else f"name the right one with {flag}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
