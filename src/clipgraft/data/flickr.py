"""The parts of Flickr8k and Flickr30k, which are lists of images in text files beside their captions."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from clipgraft.data.parts import unknown_part
from clipgraft.data.text_files import text_lines

_NAMES = {
    "train": ("Flickr_8k.trainImages.txt", "flickr30k_train.txt", "train.txt"),
    "val": ("Flickr_8k.devImages.txt", "flickr30k_val.txt", "val.txt"),
    "test": ("Flickr_8k.testImages.txt", "flickr30k_test.txt", "test.txt"),
}
_ALIKE = {"dev": "val", "validation": "val"}


def part_of_flickr(tokens: Path, split: str) -> frozenset[str]:
    """Return names, or numbers, of the images in the named parts; the lists are beside the token file.

    Raises:
        DataError: there is no list of a part, or it cannot be read.
    """
    there = {part: path for part in _NAMES if (path := _list_of(tokens.parent, part))}
    found: set[str] = set()
    for given in (part.strip() for part in split.split(",")):
        path = there.get(_ALIKE.get(given, given))
        if path is None:
            raise unknown_part(tokens, given, {part: len(_lines(path)) for part, path in there.items()})
        found.update(_lines(path))
    return frozenset(found)


def _list_of(folder: Path, part: str) -> Path | None:
    return next((folder / name for name in _NAMES[part] if (folder / name).is_file()), None)


def _lines(path: Path) -> list[str]:
    with closing(text_lines(path)) as lines:
        return [line.strip() for line in lines if line.strip()]
