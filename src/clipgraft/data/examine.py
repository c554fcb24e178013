"""Look at pairs before training on them: lengths of captions, images that are alike, odd pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.reader import find_duplicates
from clipgraft.notebook_tables import Picture, Tabled, small_pictures
from clipgraft.pictures import jpeg_thumbnail
from clipgraft.text_tables import Column, Table, table_of

_BLOCK = 2048  # images compared at once
_CAPTION = 80  # characters of a caption in a table


@dataclass(frozen=True)
class Lengths:
    """Lengths of captions in words.

    Attributes:
        fewest, median, most: of all captions.
        nineteen_of_twenty: as long as this, or shorter.
    """

    fewest: int
    median: int
    nineteen_of_twenty: int
    most: int


@dataclass(frozen=True)
class OddPair:
    """An image and a caption that the base finds unlike.

    Attributes:
        similarity: cosine of their features.
    """

    image: Path
    caption: str
    similarity: float


class OddPairs(Tabled, list[OddPair]):
    """Pairs that the base finds unlike: a list that a notebook shows with the images."""

    def table(self) -> Table:
        """A row for each pair."""
        columns = (
            *(Column("cosine", "{:.3f}".format), Column("image", lambda path: Path(path).name, left=True)),
            Column("caption", lambda caption: " ".join(caption.split())[:_CAPTION], left=True),
        )
        rows = ((pair.similarity, str(pair.image), pair.caption) for pair in self)
        title = "Pairs that the base finds least similar: look whether image and caption belong together"
        return table_of(title, columns, rows)

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """The images."""
        places = [(str(pair.image), pair.caption) for pair in self]
        return {"picture": small_pictures(places, jpeg_thumbnail)}


def caption_lengths(pairs: Pairs) -> Lengths:
    """Count the words of every caption; text that has no blanks between words counts as one."""
    counts = sorted(len(caption.split()) for _, caption in pairs.rows())
    last = len(counts) - 1
    return Lengths(counts[0], counts[last // 2], counts[19 * last // 20], counts[last])


def near_duplicates(features: Tensor, at_least: float) -> list[tuple[int, ...]]:
    """Group images whose features are alike, also through others between them.

    Args:
        features: (N, D), unit norm.
        at_least: cosine from which two images are alike.

    Returns:
        The numbers of the images of each group of two or more, in order.
    """
    found: list[tuple[int, int]] = []
    for start in range(0, len(features), _BLOCK):
        alike = features[start : start + _BLOCK] @ features[start:].T >= at_least
        one, other = alike.triu(1).nonzero(as_tuple=True)
        found += zip((one + start).tolist(), (other + start).tolist(), strict=True)
    return joined(len(features), found)


def joined(count: int, links: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Group the numbers below `count` that links join, directly or through others; lone ones are left out."""
    root = list(range(count))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = number = root[root[number]]
        return number

    for first, *others in links:
        for other in others:
            one, two = sorted((find(first), find(other)))
            root[two] = one
    groups: dict[int, list[int]] = {}
    for number in range(count):
        groups.setdefault(find(number), []).append(number)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def same_files(pairs: Pairs) -> list[tuple[int, ...]]:
    """Group the images whose files hold the same bytes, by their numbers."""
    groups = pairs.report.duplicates if pairs.report is not None else find_duplicates(pairs.images)
    number = {path: index for index, path in enumerate(pairs.images)}
    return [tuple(sorted(number[path] for path in group)) for group in groups]


def oddest_pairs(pairs: Pairs, images: Tensor, captions: Tensor, count: int) -> OddPairs:
    """Choose the pairs of the lowest similarity, the lowest first.

    Args:
        pairs: N images with M captions together.
        images: (N, D) features, unit norm.
        captions: (M, D) features in the order of `pairs.rows()`, unit norm.
        count: at most how many.
    """
    rows = pairs.rows()
    owner = torch.tensor([image for image, _ in rows])
    similar = torch.cat(
        [
            (images[owner[start : start + _BLOCK]] * captions[start : start + _BLOCK]).sum(1)
            for start in range(0, len(rows), _BLOCK)
        ]
    )
    lowest = similar.topk(min(count, len(rows)), largest=False).indices.tolist()
    return OddPairs(OddPair(pairs.images[rows[i][0]], rows[i][1], float(similar[i])) for i in lowest)
