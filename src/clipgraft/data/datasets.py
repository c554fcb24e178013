"""Images with captions, and images with one class each, of which training takes parts.

Which labelled images go into which part depends on the seed and on the path of each image below the folder
that holds them all, so neither the order of files nor the place of the data on a machine changes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

from clipgraft.data.summary import DataReport, LabelReport, PairReport
from clipgraft.errors import ConfigError, DataError
from clipgraft.notebook_tables import MOST_ROWS, Picture, Tabled, small_pictures
from clipgraft.pictures import jpeg_thumbnail
from clipgraft.shown import shown_line
from clipgraft.text_tables import Column, Table, table_of

log = logging.getLogger("clipgraft")
_SHOWN = 10  # classes that are named in one line


@dataclass(frozen=True)
class Pairs(Tabled):
    """Images and their captions in order: `captions[i]` belongs to `images[i]` and is never empty.

    `report` tells what was read and what was skipped, where `read_pairs` read them; a part of them has none.
    """

    images: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]
    report: PairReport | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, chosen: int) -> tuple[Path, tuple[str, ...]]: ...

    @overload
    def __getitem__(self, chosen: slice) -> Pairs: ...

    def __getitem__(self, chosen: int | slice) -> Pairs | tuple[Path, tuple[str, ...]]:
        """`pairs[5]` is an image with its captions, `pairs[:100]` are pairs."""
        if isinstance(chosen, slice):
            return Pairs(self.images[chosen], self.captions[chosen])
        return self.images[chosen], self.captions[chosen]

    def __iter__(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        return iter(zip(self.images, self.captions, strict=True))

    def __repr__(self) -> str:
        captions = sum(map(len, self.captions))
        return f"Pairs({len(self):,} images, {captions:,} captions{_read_from(self.report)})"

    def to_dict(self) -> dict[str, list[Any]]:
        """Return columns with a row for every caption, as for a DataFrame."""
        rows = self.rows()
        return {
            "filepath": [str(self.images[image]) for image, _ in rows],
            "title": [caption for _, caption in rows],
        }

    def table(self) -> Table:
        """A row for every caption, as in `to_dict`."""
        found = self.to_dict()
        columns = [Column(name, left=True) for name in found]
        return table_of(repr(self), columns, zip(*found.values(), strict=True))

    def head(self) -> tuple[Table, int]:
        """The rows of the first images, under what all are."""
        return replace(self[:MOST_ROWS].table(), title=repr(self)), sum(map(len, self.captions))

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """The first images, each at its first caption."""
        places = [
            (str(path) if not number else None, caption)
            for path, captions in self[:MOST_ROWS]
            for number, caption in enumerate(captions)
        ]
        return {"image": small_pictures(places[:MOST_ROWS], jpeg_thumbnail)}

    def rows(self) -> list[tuple[int, str]]:
        """Return (image index, caption) for every caption: the rows of one epoch, as in open_clip."""
        return [(image, caption) for image, texts in enumerate(self.captions) for caption in texts]


@dataclass(frozen=True)
class Labelled(Tabled):
    """Images in order with their classes: image i shows `classes[labels[i]]`. Classes are sorted by name.

    A class may have no image: parts of a data set keep the classes of the whole. `report` tells what was read
    and what was skipped, where `read_labelled` read them; a part of them has none.

    Raises:
        DataError: not one label an image, or a label that is no index into `classes`.
    """

    images: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    report: LabelReport | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images):,} images and {len(self.labels):,} labels; give one an image")
        wrong = [label for label in self.labels if not 0 <= label < len(self.classes)]
        if wrong:
            raise DataError(f"label {wrong[0]} is outside 0..{len(self.classes) - 1}; labels index `classes`")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Labelled({len(self):,} images of {len(self.classes):,} classes{_read_from(self.report)})"

    def table(self) -> Table:
        """A row for every image: its file and its class."""
        rows = ((str(image), self.classes[n]) for image, n in zip(self.images, self.labels, strict=True))
        return table_of(repr(self), [Column("filepath", left=True), Column("label", left=True)], rows)

    def head(self) -> tuple[Table, int]:
        """The rows of the first images, under what all are."""
        first = Labelled(self.images[:MOST_ROWS], self.labels[:MOST_ROWS], self.classes)
        return replace(first.table(), title=repr(self)), len(self)

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """The first images."""
        first = zip(self.images[:MOST_ROWS], self.labels, strict=False)
        places = ((str(image), self.classes[label]) for image, label in first)
        return {"image": small_pictures(places, jpeg_thumbnail)}

    def counts(self) -> tuple[int, ...]:
        """Count the images of each class."""
        counts = [0] * len(self.classes)
        for label in self.labels:
            counts[label] += 1
        return tuple(counts)


def split_labelled(data: Labelled, val_size: float, seed: int) -> tuple[Labelled, Labelled]:
    """Split each class alike into a training part and a validation part.

    Of a class of n images, `val_size` of them, rounded, are held out: at least one and at most n - 1, so that
    every class of two or more is in both parts. A class with a single image is trained on; one log line
    counts such classes. The parts are ordered by class, then by path.

    Raises:
        ConfigError: `val_size` is not between 0 and 1.
        DataError: nothing could be held out.
    """
    if not 0 < val_size < 1:
        raise ConfigError(f"`val_size` must be between 0 and 1, such as 0.1: got {val_size}")
    train: list[int] = []
    val: list[int] = []
    alone = []
    for label, members in enumerate(_shuffled_classes(data, seed)):
        held_out = max(min(int(len(members) * val_size + 0.5), len(members) - 1), min(len(members) - 1, 1), 0)
        if len(members) == 1:
            alone.append(data.classes[label])
        val += members[:held_out]
        train += members[held_out:]
    if not val:
        raise DataError(
            "no class has two images, so nothing can be held out; give validation data of its own"
        )
    if alone:
        log.warning("%s with one image, all for training, none to validate on: %s", *_named(alone))
    return _part(data, train), _part(data, val)


def few_shot(data: Labelled, shots: int, seed: int) -> Labelled:
    """Keep at most `shots` images of each class, ordered by class, then by path.

    With one seed, fewer shots are a part of more shots. One log line counts the classes that have fewer.

    Raises:
        ConfigError: `shots` is below 1.
    """
    if shots < 1:
        raise ConfigError(f"`shots` must be 1 or more: got {shots}")
    kept: list[int] = []
    short = []
    for name, members in zip(data.classes, _shuffled_classes(data, seed), strict=True):
        kept += members[:shots]
        if len(members) < shots:
            short.append(f"{name} ({len(members):,})")
    if short:
        number, names = _named(short)
        log.warning("%s with fewer than %d images: %s", number, shots, names)
    return _part(data, kept)


def match_classes(data: Labelled, classes: Sequence[str]) -> Labelled:
    """Renumber labels so that they index `classes`, as a model that was trained on them has them.

    One log line counts the classes that `data` has no image of.

    Raises:
        DataError: `data` has images of a class that is not among `classes`.
    """
    present = [name for name, count in zip(data.classes, data.counts(), strict=True) if count]
    unknown = [name for name in present if name not in set(classes)]
    if unknown:
        known = near_misses(unknown, classes)
        raise DataError(f"{_named(unknown)[0]} unknown to the model: {known}; rename, or leave these out")
    absent = [name for name in classes if name not in set(present)]
    if absent:
        log.warning("%s without an image in the validation data: %s", *_named(absent))
    index = {name: label for label, name in enumerate(classes)}
    return Labelled(data.images, tuple(index[data.classes[label]] for label in data.labels), tuple(classes))


def class_weights(data: Labelled) -> tuple[float, ...]:
    """Weigh each class inversely to its number of images; 0 where it has none.

    The mean over the images is 1, so a loss weighted by them keeps its size.
    """
    counts = data.counts()
    present = sum(count > 0 for count in counts)
    return tuple(len(data) / (present * count) if count else 0.0 for count in counts)


def near_misses(unknown: Sequence[str], known: Sequence[str]) -> str:
    """List unknown names, each with the nearest known one: `'dgo' (did you mean 'dog'?)`."""
    shown = []
    for name in unknown[:_SHOWN]:
        near = get_close_matches(name, known, n=1)
        shown.append(f"'{name}' (did you mean '{near[0]}'?)" if near else f"'{name}'")
    return ", ".join(shown) + (", ..." if len(unknown) > _SHOWN else "")


def _shuffled_classes(data: Labelled, seed: int) -> list[list[int]]:
    """Shuffle the images of each class in an order that depends on the seed and their names alone."""
    classes: list[list[int]] = [[] for _ in data.classes]
    keys = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in _portable_names(data.images)]
    for image, label in enumerate(data.labels):
        classes[label].append(image)
    return [sorted(members, key=keys.__getitem__) for members in classes]


def _portable_names(images: Sequence[Path]) -> list[str]:
    """Return paths relative to the folder that all images share, spelled alike on every system."""
    try:
        root = os.path.commonpath([path.parent for path in images]) if images else ""
    except ValueError:  # drives, or relative beside absolute paths, share no folder
        root = ""
    names = (path.relative_to(root) if root else path for path in images)
    return [unicodedata.normalize("NFC", name.as_posix()) for name in names]


def _part(data: Labelled, chosen: Sequence[int]) -> Labelled:
    ordered = sorted(chosen, key=lambda image: (data.labels[image], data.images[image]))
    images = tuple(data.images[image] for image in ordered)
    return Labelled(images, tuple(data.labels[image] for image in ordered), data.classes)


def _named(names: Sequence[str]) -> tuple[str, str]:
    """("2 classes", "cat, dog"), with no more names than fit a line."""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}", shown


def _read_from(report: DataReport | None) -> str:
    """`; t.csv: 3 of 5,000 rows skipped`, for the line that data print as."""
    if report is None:
        return ""
    skipped = f"{report.bad_rows:,} of {report.rows:,} {report.unit}s skipped"
    return f"; {shown_line(str(report.source), 100)}: {skipped if report.bad_rows else 'no row skipped'}"
