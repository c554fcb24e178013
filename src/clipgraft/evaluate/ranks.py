"""The rank of every query's true answer, exact under ties, in blocks of bounded size.

The rank of a query is 1 + the number of *other* items that score at least as high as its best true item.
A tie therefore counts against the model: a model that maps everything to one vector ranks every answer
last, where sorting would hand out ranks by position in the table.

A matrix product may give the same two vectors scores that differ in the last bit, depending on where in
the matrix they stand. So the product (float64) only decides the pairs whose difference is larger than its
rounding error can be. The few that are closer are scored again, pair by pair, in an order of additions that
depends on nothing but the two vectors, and the true item's score comes from that same arithmetic. Ranks are
thus a function of the vectors alone: not of row order, block size, device or thread count.

The bound is the classic one for a dot product of length D in any order of summation (Higham, *Accuracy and
Stability of Numerical Algorithms*, 2nd ed., eq. 3.5): |error| <= D·u / (1 - D·u) · |x|·|y| with u = 2^-53.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipgraft.errors import ConfigError, DataError, TrainingError

BLOCK_BYTES = 16 * 2**20
"""Default size of one block of float64 scores: small enough to stay near the processor's cache."""


@dataclass(frozen=True)
class RetrievalRanks:
    """1-based ranks in both directions.

    Attributes:
        image_to_text: int64 (N,), for every image the rank of its best caption; 0 where it has no caption.
        text_to_image: int64 (M,), for every caption the rank of its image.
    """

    image_to_text: Tensor
    text_to_image: Tensor


@dataclass(frozen=True)
class _Side:
    """One modality: its vectors, and for each of them as a query the score that rivals must reach."""

    rows: Tensor  # (n, D), as given
    identity: Tensor  # int64 (n,): equal vectors share a number
    best: Tensor  # float64 (n,): score of the best true item; -inf where there is none
    best_identity: Tensor  # int64 (n,): that item's identity on the other side
    slack: Tensor  # float64 (n,): the matrix product is off by less than this
    rivals: Tensor  # int64 (n,): items counted so far that score >= best, true ones included


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
        block_bytes: bytes of one block of scores. Working memory is a small multiple of it, plus two
            copies of the larger feature matrix while equal rows are found; it does not grow with N·M. The
            result does not depend on it.

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

    image_side, text_side, best_captions = _sides(images, texts, owner, block_bytes)
    for t, i in _blocks(len(texts), len(images), block_bytes):
        scores = texts[t].double() @ images[i].double().T
        _count_rivals(scores, text_side, t, image_side, i, block_bytes)
        _count_rivals(scores.T, image_side, i, text_side, t, block_bytes)
    # `rivals` holds the true items too: one image for a caption, and for an image its best captions.
    return RetrievalRanks(
        image_to_text=(image_side.rivals - best_captions + 1) * (best_captions > 0),
        text_to_image=text_side.rivals,
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


def _sides(images: Tensor, texts: Tensor, owner: Tensor, block_bytes: int) -> tuple[_Side, _Side, Tensor]:
    """Both modalities as queries, and int64 (N,): how many captions of each image tie as its best."""
    image_norm = _row_norms(images, "image", block_bytes)
    text_norm = _row_norms(texts, "text", block_bytes)
    image_id, text_id = _identities(images), _identities(texts)
    own = _pair_scores(texts, images, torch.arange(len(texts), device=owner.device), owner, block_bytes)

    best = torch.full((len(images),), -math.inf, dtype=torch.float64, device=owner.device)
    best.scatter_reduce_(0, owner, own, "amax")
    is_best = own == best[owner]
    best_captions = torch.bincount(owner[is_best], minlength=len(images))
    best_text_id = torch.full_like(best_captions, -1)
    best_text_id[owner[is_best]] = text_id[is_best]

    # Twice the bound of the module's docstring: room for the pairwise sums and the rounding of best ± slack.
    unit = (images.shape[1] + 16) * torch.finfo(torch.float64).eps
    image_slack = unit * image_norm * text_norm.max()
    text_slack = unit * text_norm * image_norm.max()
    image_side = _Side(images, image_id, best, best_text_id, image_slack, torch.zeros_like(image_id))
    text_side = _Side(texts, text_id, own, image_id[owner], text_slack, torch.zeros_like(text_id))
    return image_side, text_side, best_captions


def _row_norms(features: Tensor, kind: str, block_bytes: int) -> Tensor:
    """float64 (n,) Euclidean norms.

    Raises:
        TrainingError: a row is not finite; comparisons with NaN are all false and would look like rank 1.
    """
    parts = _parts(len(features), features.shape[1], block_bytes)
    norms: Tensor = torch.cat([torch.linalg.vector_norm(features[part].double(), dim=1) for part in parts])
    broken = (~norms.isfinite()).nonzero()
    if len(broken):
        raise TrainingError(
            f"{kind} features hold NaN or infinity in {len(broken)} of {len(features)} rows (first: row "
            f"{int(broken[0])}): the model diverged or overflowed; lower the learning rate or use fp32/bf16."
        )
    return norms


def _identities(features: Tensor) -> Tensor:
    """int64 (n,): the same number for equal vectors, different numbers for different ones."""
    comparable = features if features.dtype == torch.float64 else features.float()
    numbers: Tensor = torch.unique(comparable, dim=0, return_inverse=True)[1]
    return numbers


def _blocks(rows: int, columns: int, block_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Near-square tiles of a (rows, columns) score matrix, none larger than `block_bytes` in float64."""
    budget = block_bytes // 8
    height = min(rows, max(math.isqrt(budget), budget // columns))
    width = min(columns, budget // height)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _count_rivals(
    scores: Tensor, queries: _Side, q: slice, gallery: _Side, g: slice, block_bytes: int
) -> None:
    """Add to `queries.rivals[q]` the items of `gallery[g]` that reach each query's best true score."""
    low = (queries.best[q] - queries.slack[q])[:, None]
    high = (queries.best[q] + queries.slack[q])[:, None]
    surely = (scores > high).sum(1, dtype=torch.int32)
    perhaps = (scores >= low).sum(1, dtype=torch.int32)
    queries.rivals[q] += surely
    unsettled = (perhaps != surely).nonzero().squeeze(1)
    if not len(unsettled):
        return
    close = scores[unsettled]
    row, column = ((close >= low[unsettled]) & (close <= high[unsettled])).nonzero(as_tuple=True)
    query, item = unsettled[row] + q.start, column + g.start
    reaches = gallery.identity[item] == queries.best_identity[query]
    other = (~reaches).nonzero().squeeze(1)
    pair = _pair_scores(queries.rows, gallery.rows, query[other], item[other], block_bytes)
    reaches[other] = pair >= queries.best[query[other]]
    queries.rivals.index_add_(0, query, reaches.long())


def _pair_scores(
    left: Tensor, right: Tensor, left_row: Tensor, right_row: Tensor, block_bytes: int
) -> Tensor:
    """float64 (p,): dot products of chosen pairs; the same two vectors always give the same bits."""
    scores = torch.empty(len(left_row), dtype=torch.float64, device=left.device)
    for part in _parts(len(left_row), left.shape[1], block_bytes):
        scores[part] = _fixed_sum(left[left_row[part]].double() * right[right_row[part]].double())
    return scores


def _parts(count: int, width: int, block_bytes: int) -> Iterator[slice]:
    """Slices of `count` rows whose float64 copy of `width` columns stays within `block_bytes`."""
    step = max(1, block_bytes // (8 * width))
    return (slice(start, start + step) for start in range(0, count, step))


def _fixed_sum(terms: Tensor) -> Tensor:
    """Sum (p, D) over D by folding halves: elementwise additions leave the order to nobody else."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([folded, terms[:, 2 * half :]], dim=1) if terms.shape[1] % 2 else folded
    return terms[:, 0]
