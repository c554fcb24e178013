"""Labelled images in a training and a test part that a file fixes, as few-shot papers share them.

CoOp's `split_zhou_*.json` has lists of [path, number of the class, its name] for `train`, `val` and `test`;
validation images are not used, for nothing is chosen by them. 2SFS shares the images of single draws as
`shot_16-seed_1_train.jsonl`, one object a line.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from clipgraft.data.datasets import Labelled
from clipgraft.errors import DataError
from clipgraft.files import inside
from clipgraft.readers import reading
from clipgraft.records import Whole, parse_json, read_json
from clipgraft.shown import shown_line

log = logging.getLogger("clipgraft")
_NAMED = 5
_AGAIN = "download it again"


@dataclass(frozen=True)
class Entry:
    """One image: its file, the number of its class, and the name of that class."""

    path: Path
    label: int
    name: str


@dataclass(frozen=True)
class ClassSplits:
    """Images to draw shots from, and images to test on, of the same classes in the order of their numbers.

    Attributes:
        train: every class has an image in it.
        test: of the same classes.
        names: of the classes as they are written, for prompts; where two classes share a name, the `classes`
            of the parts tell them apart by their number.
    """

    train: Labelled
    test: Labelled
    names: tuple[str, ...]

    def __repr__(self) -> str:
        sizes = f"{len(self.train):,} images to draw from, {len(self.test):,} to test on"
        return f"ClassSplits({len(self.names):,} classes, {sizes})"

    def halves(self) -> tuple[ClassSplits, ClassSplits]:
        """Return the base classes, the first ⌈C/2⌉, and the novel ones, the others; CoOp's two halves."""
        middle = math.ceil(len(self.names) / 2)
        return self._part(0, middle), self._part(middle, len(self.names))

    def _part(self, start: int, end: int) -> ClassSplits:
        train, test = (class_range(data, start, end) for data in (self.train, self.test))
        return ClassSplits(train, test, self.names[start:end])


@dataclass(frozen=True)
class _Split:
    """What `split_zhou_*.json` holds."""

    train: list[tuple[str, Whole, str]]
    val: list[tuple[str, Whole, str]]
    test: list[tuple[str, Whole, str]]


class _Shot(TypedDict):
    _impath: str
    _label: Whole
    _classname: str


"""One line of a file of shots; what else it says is not used."""


def read_split(path: Path, images: Path, *, strict: bool = False) -> ClassSplits:
    """Read a split in CoOp's layout.

    Args:
        path: the JSON file.
        images: the folder that its paths are relative to, which none of them may leave.
        strict: refuse absent images, instead of counting them.

    Raises:
        DataError: the file cannot be read, a path leads out of the folder, or no image is there.
    """
    split = read_json(path, _Split, DataError, _AGAIN)
    train, test = (
        [Entry(inside(images, name, path, _AGAIN), label, title) for name, label, title in part]
        for part in (split.train, split.test)
    )
    return gather_splits(train, test, path, strict=strict)


def gather_splits(
    train: Sequence[Entry], test: Sequence[Entry], source: Path, *, strict: bool = False
) -> ClassSplits:
    """Check the images of both parts, and number their classes anew.

    Absent images, and classes without a training image, are left out and counted in a line each.

    Raises:
        DataError: a class has two names, fewer than two are left, or with `strict` anything was left out.
    """
    present = [_present(part, source, what, strict) for part, what in ((train, "train"), (test, "test"))]
    names = _names([*present[0], *present[1]], source)
    kept = sorted({entry.label for entry in present[0]})
    _tell(
        [names[label] for label in sorted(names.keys() - set(kept))],
        f"{source}: classes without a training image are left out",
        strict,
    )
    if len(kept) < 2:
        raise DataError(f"{source}: has training images of {len(kept)} class; a classifier needs two or more")
    shared = Counter(names[label] for label in kept)
    twice = [name for name, count in shared.items() if count > 1]
    if twice:
        log.warning("%s: classes that share a name with another: %s", source, _some(twice))
    classes = tuple(
        names[label] if shared[names[label]] == 1 else f"{names[label]} ({label})" for label in kept
    )
    number = {label: place for place, label in enumerate(kept)}
    parts = [
        Labelled(
            tuple(entry.path for entry in part if entry.label in number),
            tuple(number[entry.label] for entry in part if entry.label in number),
            classes,
        )
        for part in present
    ]
    if not len(parts[1]):
        raise DataError(f"{source}: has no test image of a class that has training images")
    return ClassSplits(parts[0], parts[1], tuple(names[label] for label in kept))


def read_shots(path: Path, find: Callable[[str], Path], splits: ClassSplits) -> Labelled:
    """Read the training images of one draw in 2SFS's layout: `_impath`, `_label`, `_classname` a line.

    Args:
        path: the JSONL file.
        find: the file of an `_impath`; raises DataError where it leads out of its folder.
        splits: what the draw is from; images of other classes are refused.

    Raises:
        DataError: the file cannot be read, names an image that is absent, or a class that is none.
    """
    with reading(path, DataError, _AGAIN):
        lines = path.read_text(encoding="utf-8").splitlines()
    known = {name: place for place, name in reversed(list(enumerate(splits.names)))}
    images, labels = [], []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        shot = parse_json(line, _Shot, where, DataError, _AGAIN)
        name, label = shot["_classname"], shot["_label"]
        if name not in known:
            raise DataError(f"{where}: {shown_line(name)!r} is no class of the set; {_AGAIN}")
        image = find(shot["_impath"])
        if not image.is_file():
            raise DataError(f"{where}: {image} is not there; put the images where the set's instructions say")
        images.append(image)
        # Of classes that share a name the number decides.
        own = label < len(splits.names) and splits.names[label] == name
        labels.append(label if own else known[name])
    absent = [name for place, name in enumerate(splits.names) if place not in set(labels)]
    if absent:
        raise DataError(f"{path}: has no image of {_some(absent)}; {_AGAIN}")
    return Labelled(tuple(images), tuple(labels), splits.train.classes)


def _present(entries: Sequence[Entry], source: Path, what: str, strict: bool) -> list[Entry]:
    found = [entry for entry in entries if entry.path.is_file()]
    if len(found) == len(entries) and entries:
        return found
    first = next((entry.path for entry in entries if not entry.path.is_file()), None)
    if not found:
        missing = f"none of its {len(entries):,} {what} images is there (first: {first})"
        raise DataError(f"{source}: {missing}; put the images where the set's instructions say")
    absent = f"{len(entries) - len(found):,} of {len(entries):,} {what} images are not there (first: {first})"
    if strict:
        raise DataError(f"{source}: {absent}; add them, or drop `strict`")
    log.warning("%s: %s: left out", source, absent)
    return found


def _names(entries: Iterable[Entry], source: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        if names.setdefault(entry.label, entry.name) != entry.name:
            both = f"{shown_line(names[entry.label])!r} and {shown_line(entry.name)!r}"
            raise DataError(f"{source}: class {entry.label} is called {both}; {_AGAIN}")
    return names


def _tell(names: Sequence[str], what: str, strict: bool) -> None:
    if not names:
        return
    if strict:
        raise DataError(f"{what}: {_some(names)}; add images, or drop `strict`")
    log.warning("%s: %s", what, _some(names))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(shown_line(name) for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names):,} ({shown})"


def class_range(data: Labelled, start: int, end: int) -> Labelled:
    """Return the images of the classes from `start` up to `end`, numbered from 0."""
    own = [place for place, label in enumerate(data.labels) if start <= label < end]
    images = tuple(data.images[place] for place in own)
    return Labelled(images, tuple(data.labels[place] - start for place in own), data.classes[start:end])
