"""Rank every query's true answer, exactly under ties, in blocks of bounded size.

The rank of a query is 1 + the number of *other* items that score at least as high as its best true item.
A tie therefore counts against the model: a model that maps everything to one vector ranks every answer
last, where sorting would hand out ranks by position in the table.

A matrix product may give the same two vectors scores that differ in the last bit, depending on where in
the matrix they stand. So a product only decides the pairs whose difference is larger than its error can be.
The few that are closer are scored again, pair by pair: in float32, and those that are too close for that as
`scores.Exact` does; the true item's score comes from that same arithmetic. Ranks are thus a function of the
vectors alone: not of row order, block size, device or thread count, nor of the number type of the product.

That leaves the type free. Each block is multiplied in the fastest type the machine has (int8, then bfloat16,
float32, and float64), and again in the next one only if too many of its pairs were too close to call.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.scores import (
    Exact,
    Int8Products,
    Products,
    Vectors,
    identities,
    measured,
    usable_types,
)

BLOCK_BYTES = 16 * 2**20
"""Default size of one block of float64 scores: small enough to stay near the processor's cache."""

_FEW = 1 / 64  # share of a block's pairs up to which scoring them one by one costs less than a finer product
_UNIT = 64
_SPARSE = (
    1 / 8
)  # share of a block that is looked at item by item, where the highest of groups reach the score
_WORTH_INT8 = 1000  # queries a row, from which rows are worth being rounded to int8
_MANY = 1 << 28  # scores from which threads are started
_WORKERS = 8  # threads at most, each of which has the memory for its blocks
_PATIENCE = 2  # blocks by which a type's failures may lead its successes before it is given up


_Strip: TypeAlias = list[tuple[slice, slice]]
"""Blocks, each of texts and images, that have their texts in common."""


@dataclass(frozen=True)
class RetrievalRanks:
    """1-based ranks in both directions.

    Attributes:
        image_to_text: int64 (N,), for every image the rank of its best caption; 0 where it has no caption.
        text_to_image: int64 (M,), for every caption the rank of its image.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> RetrievalRanks:
    """Rank images for every caption and captions for every image, by dot product.

    Args:
        image_features: floating (N, D). Rows are used as given: pass unit-norm rows for cosine similarity.
        text_features: floating (M, D), on any device; work happens where the images are (on the CPU if that
            device has no float64).
        image_of_text: integer (M,), each caption's image; images may have several captions, or none.
        block_bytes: bytes of one block of float64 scores. Working memory is a small multiple of it for each
            of at most 8 threads, plus a few numbers a row and, in int8, the images; it does not grow with
            N·M. The result depends neither on it nor on the threads.

    Raises:
        DataError: shapes, types or indices that do not fit together.
        TrainingError: a feature is NaN or infinite.
        ConfigError: a block that cannot hold one score.
    """
    if block_bytes < 8:
        raise ConfigError(f"block_bytes is {block_bytes}: one score takes 8 bytes, give at least 8.")
    images = _checked_features(image_features, "image")
    texts = _checked_features(text_features, "text").to(images.device)
    owner = _checked_owner(image_of_text, images, texts).to(images.device)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return _ranks(
            measured(texts, "text", block_bytes), measured(images, "image", block_bytes), owner, block_bytes
        )


def _checked_features(features: Tensor, kind: str) -> Tensor:
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise DataError(
            f"{kind} features are {features.dtype} of shape {tuple(features.shape)}: "
            "pass a floating-point matrix with one row an item and at least one row."
        )
    features = features.detach()
    return features.cpu() if features.device.type == "mps" else features


def _checked_owner(image_of_text: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    if images.shape[1] != texts.shape[1]:
        raise DataError(
            f"image features have {images.shape[1]} columns and text features {texts.shape[1]}: "
            "encode both with the same model."
        )
    if image_of_text.shape != (len(texts),) or image_of_text.is_floating_point():
        raise DataError(
            f"image_of_text is {image_of_text.dtype} of shape {tuple(image_of_text.shape)} for {len(texts)} "
            "captions: pass one integer a caption, the row of its image."
        )
    owner = image_of_text.detach().long()
    wrong = ((owner < 0) | (owner >= len(images))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"image_of_text[{row}] is {int(owner[row])}, but there are {len(images)} images: "
            f"indices go from 0 to {len(images) - 1}."
        )
    return owner


def _ranks(texts: Vectors, images: Vectors, owner: Tensor, block_bytes: int) -> RetrievalRanks:
    own = Exact(texts, images, block_bytes).pairs(torch.arange(len(texts), device=owner.device), owner)
    # Captions whose images many others rival come together, so that blocks of the rest are settled in int8.
    order = own.argsort()
    texts, own, owner = texts.ordered(order), own[order], owner[order]
    best = torch.full((len(images),), -math.inf, dtype=torch.float64, device=owner.device)
    best.scatter_reduce_(0, owner, own, "amax")
    is_best = (own == best[owner]).nonzero().squeeze(1)
    best_captions = torch.bincount(owner[is_best], minlength=len(images))
    best_caption = torch.full_like(best_captions, -1)
    best_caption[owner[is_best]] = is_best
    best[best_captions == 0] = math.inf  # nothing reaches it, so an image without captions costs no time

    problem = _Problem(texts, images, (own, owner), (best, best_caption), block_bytes)
    of_texts, of_images = _rivals(problem)
    text_to_image = torch.empty_like(of_texts)
    text_to_image[order] = of_texts
    # The true items are rivals too: one image for a caption, and for an image its best captions.
    return RetrievalRanks(
        image_to_text=(of_images - best_captions + 1) * (best_captions > 0),
        text_to_image=text_to_image,
    )


@dataclass(frozen=True)
class _Problem:
    """Both sides, with the score that a rival of each text and image must reach and whose score that is."""

    texts: Vectors
    images: Vectors
    of_text: tuple[Tensor, Tensor]
    of_image: tuple[Tensor, Tensor]
    block_bytes: int


def _rivals(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Count the rivals of each text and of each image, int64 (m,) and (n,)."""
    products = _SharedProducts(problem)
    rows, columns, threads = len(problem.texts), len(problem.images), torch.get_num_threads()
    strips = iter(list(_strips(rows, columns, problem.block_bytes)))
    if threads == 1 or rows * columns < _MANY or problem.images.rows.device.type != "cpu":
        return _count(problem, products, strips)

    def count(_: int) -> tuple[Tensor, Tensor]:
        # What the caller switched off is on again in a new thread.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _count(problem, products, strips)

    # Each thread has its own blocks. Threads that share every block wait for each other at each, which takes
    # longer than all products where something else is at work on the machine.
    workers = min(threads, _WORKERS)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
        ) as pool:
            found = list(pool.map(count, range(workers)))
    finally:
        torch.set_num_threads(threads)  # the number of threads that are yet to start was changed too
    of_texts, of_images = (torch.stack(own).sum(0) for own in zip(*found, strict=True))
    return of_texts, of_images


def _count(problem: _Problem, products: _SharedProducts, strips: Iterator[_Strip]) -> tuple[Tensor, Tensor]:
    """`_rivals` among the blocks of the strips that no other thread has taken."""
    texts, images = problem.texts, problem.images
    of_texts = _Queries(texts, images, *problem.of_text, problem.block_bytes)
    of_images = _Queries(images, texts, *problem.of_image, problem.block_bytes)
    ladder = _Ladder(products)
    for strip in strips:
        ladder.start()
        for t, i in strip:
            ladder.count(of_texts, t, of_images, i)
    return of_texts.rivals, of_images.rivals


class _SharedProducts:
    """The products of both sides in each number type, prepared when one of the threads first needs them."""

    def __init__(self, problem: _Problem) -> None:
        self._sides = problem.texts, problem.images, problem.block_bytes
        self._products: dict[torch.dtype, Products | Int8Products] = {}
        self._lock = threading.Lock()

    @property
    def kinds(self) -> list[torch.dtype]:
        """The number types worth a try, the coarsest first."""
        texts, images, _ = self._sides
        kinds = usable_types(images.rows.device)
        if len(texts) * len(images) < _WORTH_INT8 * (len(texts) + len(images)):
            kinds = [kind for kind in kinds if kind != torch.int8]
        return kinds

    def of(self, kind: torch.dtype) -> Products | Int8Products:
        with self._lock:
            if kind not in self._products:
                made = (
                    Int8Products(*self._sides)
                    if kind == torch.int8
                    else Products(*self._sides[:2], kind, self._sides[2])
                )
                self._products[kind] = made
            return self._products[kind]


class _Ladder:
    """Counts each block with the coarsest number type that settles it, and drops types that rarely do."""

    def __init__(self, products: _SharedProducts) -> None:
        self._products = products
        self._failures = dict.fromkeys(products.kinds, 0)

    def start(self) -> None:
        """Begin with other captions: what int8 could not settle of those before says nothing of them."""
        if torch.int8 in self._failures:
            self._failures[torch.int8] = 0

    def count(self, of_texts: _Queries, t: slice, of_images: _Queries, i: slice) -> None:
        """Add one block to the rivals of its texts (rows) and images (columns)."""
        texts_open = images_open = True
        for kind, failures in self._failures.items():
            if failures > _PATIENCE:
                continue
            product = self._products.of(kind)
            scores, last = product.block(t, i), kind == torch.float64
            if texts_open:
                own = _Scores(scores, product.unit, product.left_slack[t], last)
                texts_open = not of_texts.count(own, t, i)
            if images_open:
                own = _Scores(scores.T, product.unit, product.right_slack[i], last)
                images_open = not of_images.count(own, i, t)
            if not (texts_open or images_open):
                self._failures[kind] -= 1
                return
            self._failures[kind] += 1


@dataclass(frozen=True)
class _Scores:
    """A block of scores: queries by items.

    Attributes:
        values: (q, g), of a floating type, or int32.
        unit: what they are to be multiplied by.
        slack: float64 (q,), by how much a product may be off.
        last: whether nothing finer follows.
    """

    values: Tensor
    unit: float
    slack: Tensor
    last: bool

    def bounds(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """What values have to reach, and to exceed to be sure of it, to score at least float64 (q,) best."""
        low, high = (best - self.slack) / self.unit, (best + self.slack) / self.unit
        if self.values.dtype != torch.int32:
            return low.to(self.values.dtype), high.to(self.values.dtype)
        most = torch.iinfo(torch.int32).max
        return low.ceil().clamp(-most, most).int(), high.floor().clamp(-most, most).int()

    @property
    def few(self) -> float:
        """The share of pairs up to which they are scored one by one."""
        return _FEW / 8 if self.values.dtype == torch.int32 else _FEW


class _Queries:
    """One modality as queries: the score that rivals must reach, and how many have."""

    def __init__(
        self, rows: Vectors, gallery: Vectors, best: Tensor, best_row: Tensor, block_bytes: int
    ) -> None:
        self.best = best  # float64 (n,): score of the best true item
        self.rivals = torch.zeros_like(best_row)  # items counted so far that score >= best, true ones too
        self._best_row = best_row  # int64 (n,): that item's row in the gallery
        self._gallery = gallery
        self._exact = Exact(rows, gallery, block_bytes)
        self._finer = Products(rows, gallery, torch.float32, block_bytes)
        self._block_bytes = block_bytes

    def count(self, block: _Scores, q: slice, g: slice) -> bool:
        """Count the rivals among gallery[g] of queries[q] from their scores.

        Returns False, with nothing counted, when too many scores are too close to call; never of the last.
        """
        if not self.best[q].isfinite().any():
            return True
        scores, (low, high) = block.values, block.bounds(self.best[q])
        groups, highest = _groups(scores)
        row, group = (highest >= low[:, None]).nonzero(as_tuple=True)
        if not len(row):
            return True
        if len(row) * groups.shape[2] <= _SPARSE * scores.numel():
            values = groups[row, group]
            hit, place = (values >= low[row, None]).nonzero(as_tuple=True)
            if len(hit) <= block.few * scores.numel():
                row, column = row[hit], group[hit] * groups.shape[2] + place
                self._count_pairs(row + q.start, column + g.start, values[hit, place] > high[row], block.last)
                return True
        active = (highest.amax(1) >= low).nonzero().squeeze(1)
        if 2 * len(active) <= len(scores):
            scores, low, high = scores.index_select(0, active), low[active], high[active]
        else:
            active = torch.arange(len(scores), device=scores.device)
        perhaps = scores >= low[:, None]
        if int(torch.count_nonzero(perhaps)) <= block.few * perhaps.numel():
            row, column = perhaps.nonzero(as_tuple=True)
            surely = scores[row, column] > high[row]
            self._count_pairs(active[row] + q.start, column + g.start, surely, block.last)
            return True
        surely = scores > high[:, None]
        sure = surely.sum(1, dtype=torch.int32)
        unsettled = (perhaps.sum(1, dtype=torch.int32) != sure).nonzero().squeeze(1)
        query, item = active + q.start, g.start
        if len(unsettled):
            close = perhaps[unsettled] ^ surely[unsettled]
            if not self._settle(close, query[unsettled], item, block):
                return False
        self.rivals[query] += sure
        return True

    def _count_pairs(self, query: Tensor, item: Tensor, surely: Tensor, last: bool) -> None:
        """Count the rivals among chosen pairs, of which some are sure."""
        self.rivals.index_add_(0, query, surely.long())
        self._settle_pairs(query[~surely], item[~surely], last)

    def _settle(self, close: Tensor, query: Tensor, first_item: int, block: _Scores) -> bool:
        """Count the rivals among the close pairs, bool (rows, items); rows are `query`."""
        number = int(close.sum())
        last = block.last
        if not last and number > max(block.few * close.numel(), len(close)):
            return False
        if last and number > _FEW * close.numel():
            same = self._same(query, slice(first_item, first_item + close.shape[1])) & close
            self.rivals[query] += same.sum(1)
            close = close & ~same
        row, column = close.nonzero(as_tuple=True)
        self._settle_pairs(query[row], column + first_item, last)
        return True

    def _settle_pairs(self, query: Tensor, item: Tensor, last: bool) -> None:
        """Count the rivals among chosen pairs; float32 tells nothing that float64 could not, if `last`."""
        if not last:
            query, item = self._settle_finer(query, item)
        reaches = self._exact.pairs(query, item) >= self.best[query]
        self.rivals.index_add_(0, query, reaches.long())

    def _settle_finer(self, query: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Count the rivals that float32 can tell among pairs, and return the pairs that it cannot."""
        scores = self._finer.pairs(query, item).double()
        best, slack = self.best[query], self._finer.left_slack[query]
        surely = scores > best + slack
        self.rivals.index_add_(0, query, surely.long())
        left = (scores >= best - slack) & ~surely
        return query[left], item[left]

    def _same(self, query: Tensor, items: slice) -> Tensor:
        """Tell, as bool (rows, items), whether an item is a copy of the query's best true item."""
        return self._identity[self._best_row[query]][:, None] == self._identity[items][None, :]

    @functools.cached_property
    def _identity(self) -> Tensor:
        return identities(self._gallery, self._block_bytes)


def _groups(scores: Tensor) -> tuple[Tensor, Tensor]:
    """View (q, g) as (q, groups, items), in equal groups of at most a bound; with the highest of each."""
    queries, items = scores.shape
    size = math.gcd(items, _UNIT)
    down, across = scores.stride()
    groups = scores.as_strided((queries, items // size, size), (down, size * across, across))
    if across <= down:
        return groups, groups.amax(2)
    # torch takes a hundred times as long unless what lies together in memory comes last.
    return groups, groups.permute(1, 2, 0).amax(1).T


def _whole(size: int) -> int:
    """Round a size down to whole registers of a matrix unit, where it holds one."""
    return size - size % _UNIT if size >= _UNIT else size


def _strips(rows: int, columns: int, block_bytes: int) -> Iterator[_Strip]:
    """Yield near-square tiles of a (rows, columns) score matrix, at most `block_bytes` each in float64.

    Those of the same rows are yielded together.
    """
    budget = block_bytes // 8
    height = min(rows, _whole(max(math.isqrt(budget), budget // columns)))
    width = min(columns, _whole(budget // height))
    for top in range(0, rows, height):
        own = slice(top, min(top + height, rows))
        yield [(own, slice(left, min(left + width, columns))) for left in range(0, columns, width)]
