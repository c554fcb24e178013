"""Select the queries, images and pairs of classes that a report shows, from features of both models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.evaluate.classification import ClassificationResult
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.evaluate.retrieval import retrieval_metrics
from clipgraft.report.examples import Classes, Examples, Found, Pair, Query, QueryKind, Similarities

_T = TypeVar("_T")
TOP = 5
SHOWN: dict[QueryKind, int] = {"fixed": 4, "broken": 2, "both wrong": 2, "both right": 1}
HEAT = 12
PAIRS, PICTURES = 6, 4


@dataclass(frozen=True)
class Features:
    """Unit-norm features of one model: images (N, D), and texts (M, D) or classes (C, D)."""

    images: Tensor
    texts: Tensor


class ShownImages:
    """Image files that are shown, each once, by position."""

    def __init__(self, files: Sequence[object]) -> None:
        self._files = files
        self.shown: list[str] = []
        self._places: dict[int, int] = {}

    def __call__(self, image: int) -> int:
        """Return the position in `shown` of image number `image`."""
        if image not in self._places:
            self._places[image] = len(self.shown)
            self.shown.append(str(self._files[image]))
        return self._places[image]


def retrieval_examples(pairs: Pairs, sides: Mapping[str, Features], missing: int) -> Examples:
    """Select queries and similarities of retrieval; `texts` are all captions in image order."""
    rows = pairs.rows()
    owner = torch.tensor([image for image, _ in rows])
    base, adapted = sides["base"], sides["adapted"]
    ranks = {name: retrieval_ranks(s.images, s.texts, owner).text_to_image for name, s in sides.items()}
    kinds = _kinds(ranks["base"], ranks["adapted"])
    album = ShownImages([path.absolute() for path in pairs.images])
    chosen = [(kind, row) for kind, number in SHOWN.items() for row in _spread(kinds[kind], number, owner)]
    tops = {name: _tops(side, [row for _, row in chosen]) for name, side in sides.items()}
    queries = []
    for place, (kind, row) in enumerate(chosen):
        found = [
            Found(int(ranks[name][row]), tuple(map(album, tops[name][0][place])), tuple(tops[name][1][place]))
            for name in ("base", "adapted")
        ]
        queries.append(Query(rows[row][1], album(rows[row][0]), kind, found[0], found[1]))
    heat = _caption_heat(pairs, sides, album)
    return Examples(
        task="retrieval",
        base=retrieval_metrics(base.images, base.texts, owner),
        adapted=retrieval_metrics(adapted.images, adapted.texts, owner),
        items=len(pairs),
        missing=missing,
        counts={kind: len(found) for kind, found in kinds.items()},
        images=tuple(album.shown),
        queries=tuple(queries),
        heat=heat,
        classes=None,
    )


def _kinds(base: Tensor, adapted: Tensor) -> dict[QueryKind, list[int]]:
    """Group captions by whether rank 1 was right before and after adaptation."""
    before, after = base == 1, adapted == 1
    split: dict[QueryKind, Tensor] = {
        "fixed": ~before & after,
        "broken": before & ~after,
        "both wrong": ~before & ~after,
        "both right": before & after,
    }
    return {kind: mask.nonzero()[:, 0].tolist() for kind, mask in split.items()}


def _spread(rows: Sequence[int], number: int, owner: Tensor | None = None) -> list[int]:
    """Pick `number` evenly spaced rows, so that they are neither the best nor the worst ones."""
    if owner is not None:
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(int(owner[row]), row)
        rows = list(first.values())
    if len(rows) <= number:
        return list(rows)
    return [rows[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]


def _tops(side: Features, rows: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
    """Return image numbers and cosines of the first images for some captions."""
    if not rows:
        return [], []
    scores, images = (side.texts[list(rows)] @ side.images.T).topk(min(TOP, len(side.images)))
    return images.tolist(), _rounded(scores)


def _caption_heat(pairs: Pairs, sides: Mapping[str, Features], album: ShownImages) -> Similarities:
    """Compare a dozen images, spread over the data, with the first caption of each; equal captions once."""
    starts = [0]
    for captions in pairs.captions:
        starts.append(starts[-1] + len(captions))
    distinct: dict[str, int] = {}
    for image, captions in enumerate(pairs.captions):
        distinct.setdefault(captions[0], image)
    chosen = _spread(list(distinct.values()), HEAT)
    texts = [starts[image] for image in chosen]
    base, adapted = (_rounded(s.images[chosen] @ s.texts[texts].T) for s in (sides["base"], sides["adapted"]))
    return Similarities(
        tuple(map(album, chosen)),
        tuple(pairs.captions[image][0] for image in chosen),
        tuple(range(len(chosen))),
        _frozen(base),
        _frozen(adapted),
    )


def class_examples(
    data: Labelled,
    sides: Mapping[str, Features],
    results: Mapping[str, ClassificationResult],
    predicted: Sequence[int],
    missing: int,
    head: str,
) -> Examples:
    """Select confusions and similarities of classification; `texts` are the classes."""
    album = ShownImages([path.absolute() for path in data.images])
    confusions = {name: result.confusion.tolist() for name, result in results.items()}
    heat = _class_heat(data, sides, album)
    pairs = _pairs(data, confusions, predicted, album)
    return Examples(
        task="classification",
        base=results["base"].metrics,
        adapted=results["adapted"].metrics,
        items=len(data),
        missing=missing,
        counts={},
        images=tuple(album.shown),
        queries=(),
        heat=heat,
        classes=Classes(
            names=data.classes,
            base=_frozen(confusions["base"]),
            adapted=_frozen(confusions["adapted"]),
            pairs=pairs,
            head=head,
        ),
    )


def _pairs(
    data: Labelled, confusions: Mapping[str, list[list[int]]], predicted: Sequence[int], album: ShownImages
) -> tuple[Pair, ...]:
    """List the pairs of classes that the adapted model confuses most often."""
    counts = [
        (count, true, other)
        for true, row in enumerate(confusions["adapted"])
        for other, count in enumerate(row)
        if other != true and count
    ]
    pairs = []
    for count, true, other in sorted(counts, key=lambda item: (-item[0], item[1:]))[:PAIRS]:
        mistaken = [
            image
            for image, (label, taken) in enumerate(zip(data.labels, predicted, strict=True))
            if (label, taken) == (true, other)
        ]
        shown = tuple(map(album, mistaken[:PICTURES]))
        pairs.append(Pair(true, other, confusions["base"][true][other], count, shown))
    return tuple(pairs)


def _class_heat(data: Labelled, sides: Mapping[str, Features], album: ShownImages) -> Similarities:
    """Compare one image of each of a dozen classes with those classes."""
    first: dict[int, int] = {}
    for image, label in enumerate(data.labels):
        first.setdefault(label, image)
    labels = _spread(sorted(first), HEAT)
    images = [first[label] for label in labels]
    base, adapted = (
        _rounded(s.images[images] @ s.texts[labels].T) for s in (sides["base"], sides["adapted"])
    )
    return Similarities(
        tuple(map(album, images)),
        tuple(data.classes[label] for label in labels),
        tuple(range(len(labels))),
        _frozen(base),
        _frozen(adapted),
    )


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in scores.tolist()]


def _frozen(rows: Iterable[Iterable[_T]]) -> tuple[tuple[_T, ...], ...]:
    return tuple(tuple(row) for row in rows)
