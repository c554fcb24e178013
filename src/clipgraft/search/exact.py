"""Nearest rows by comparing with all of them, a block of memory-mapped vectors at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipgraft.search.filters import Condition, check_columns, rows_where
from clipgraft.search.folder import Encoded
from clipgraft.search.store import Array

_BLOCK = 1 << 14


def nearest(encoded: Encoded, queries: Array, k: int, where: Sequence[Condition] = ()) -> tuple[Array, Array]:
    """The k rows of the highest inner product for each query, among those that meet the conditions.

    Args:
        encoded: the vectors.
        queries: (Q, D) float32.
        k: how many; fewer are found where there are fewer rows.
        where: conditions on metadata.

    Returns:
        float32 scores and int64 rows, (Q, ≤k) each, best first; of equal scores the lower row.
    """
    best = [_Best(k) for _ in queries]
    columns = list(dict.fromkeys(condition.column for condition in where))
    if where and encoded.shards:
        check_columns(where, encoded.columns())
    start = 0
    for shard in encoded.shards:
        vectors = encoded.vectors(shard)
        chosen = rows_where(encoded.metadata(shard, columns), where) if where else np.arange(shard.rows)
        for first in range(0, len(chosen), _BLOCK):
            part = chosen[first : first + _BLOCK]
            found = vectors[part] if where else vectors[first : first + _BLOCK]
            for own, more in zip(best, queries @ np.asarray(found, np.float32).T, strict=True):
                own.add(more, part + start)
        start += shard.rows
    return np.stack([own.scores for own in best]), np.stack([own.rows for own in best])


class _Best:
    """The k best rows of one query so far, best first."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores: Array = np.empty(0, np.float32)
        self.rows: Array = np.empty(0, np.int64)

    def add(self, scores: Array, rows: Array) -> None:
        """Take in more rows, all of which come after those before."""
        if len(self.scores) == self.k:  # an equal score loses to the lower row
            better = scores > self.scores[-1]
            scores, rows = scores[better], rows[better]
        scores, rows = np.concatenate([self.scores, scores]), np.concatenate([self.rows, rows])
        order = np.lexsort((rows, -scores))[: self.k]
        self.scores, self.rows = scores[order], rows[order]
