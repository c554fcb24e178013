"""Find the rows of an encoded folder that are nearest to queries, exactly, by comparing with all of them.

Stored vectors stay in their mapped files, in fp16 or fp32. Blocks of them that fit in the processor's cache
are widened to fp32 and multiplied. Such a product may be off in its last bits, by no more than a known share
of the lengths of the vectors; what it cannot tell from the k-th best is scored once more in float64, in one
order of additions. Hits are thus a function of the vectors alone: not of their places, of how many queries
are asked together, nor of the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clipgraft.search.filters import Condition, check_columns, rows_where
from clipgraft.search.folder import EncodedSet
from clipgraft.search.store import Array, as_tensor

_BLOCK_BYTES = 4 << 20  # of widened vectors
_MANY = 1 << 15  # rows from which threads are started
_EXACT_ROWS = 1 << 13  # scored at once in float64
_HELD = 1 << 20  # rows that are too close to call, until they are settled early: equal vectors are
_LONGEST = 1.01  # stored vectors have unit length, but for the rounding to fp16
_SPARE = 8  # roundings besides the D of a sum


def nearest(
    encoded: EncodedSet, queries: Array, k: int, where: Sequence[Condition] = ()
) -> tuple[Array, Array]:
    """Find the k rows of the highest inner product for each query, among those that meet the conditions.

    Args:
        encoded: the vectors, of unit length.
        queries: (Q, D) float32.
        k: how many; fewer are found where there are fewer rows.
        where: conditions on metadata.

    Returns:
        float32 scores and int64 rows, (Q, ≤k) each, best first; of equal scores the lower row.
    """
    stored = _Stored.of(encoded, where)
    k = min(k, stored.count)
    threads = torch.get_num_threads() if stored.count >= _MANY else 1
    if threads == 1:
        parts = [_candidates(stored, queries, k, 0, 1)]
    else:
        # Each thread has its own blocks. Threads that share every block wait for each other at each, which
        # takes longer than all products where something else is at work on the machine.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            numbers = range(threads)
            parts = list(pool.map(lambda turn: _candidates(stored, queries, k, turn, threads), numbers))
        torch.set_num_threads(threads)  # the number of threads that are yet to start was changed too
    rows = [np.concatenate(own) for own in zip(*parts, strict=True)]
    found = _settled(stored, queries, rows, k)
    return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])


def _candidates(stored: _Stored, queries: Array, k: int, turn: int, turns: int) -> list[Array]:
    """The rows of some blocks that can be among the k best of each query."""
    asked = torch.from_numpy(np.array(queries, np.float32))
    best = _Best(asked, k)
    for rows, block in stored.blocks(turn, turns):
        best.add(rows, asked @ block.T)
        if best.held > _HELD + 2 * best.k * len(queries):
            best.keep(_settled(stored, queries, best.candidates(), k))
    return best.candidates()


@dataclass(frozen=True)
class _Stored:
    """The mapped vectors of all shards, and which of their rows are searched; None for all."""

    parts: Sequence[Array]
    starts: Array
    chosen: Sequence[Array | None]

    @classmethod
    def of(cls, encoded: EncodedSet, where: Sequence[Condition]) -> _Stored:
        columns = list(dict.fromkeys(condition.column for condition in where))
        if where and encoded.shards:
            check_columns(where, encoded.columns())
        parts, chosen = list[Array](), list[Array | None]()
        for shard in encoded.shards:
            parts.append(encoded.vectors(shard))
            chosen.append(rows_where(encoded.metadata(shard, columns), where) if where else None)
        return cls(parts, np.cumsum([0, *(len(part) for part in parts)]), chosen)

    @property
    def count(self) -> int:
        """How many rows are searched."""
        pairs = zip(self.parts, self.chosen, strict=True)
        return sum(len(part) if chosen is None else len(chosen) for part, chosen in pairs)

    def blocks(self, turn: int, turns: int) -> Iterator[tuple[Array, Tensor]]:
        """Yield the numbers of rows with their vectors, fp32 (n, D), in memory that the next ones reuse.

        Of `turns` blocks that follow each other only number `turn`.
        """
        buffer: Tensor | None = None
        for part, start, chosen in zip(self.parts, self.starts, self.chosen, strict=False):
            step = max(1, _BLOCK_BYTES // (4 * part.shape[1]))
            numbers = np.arange(len(part)) if chosen is None else chosen
            for first in range(turn * step, len(numbers), turns * step):
                own = numbers[first : first + step]
                block = as_tensor(part[first : first + step] if chosen is None else part[own])
                if block.dtype != torch.float32:
                    buffer = torch.empty(step, part.shape[1]) if buffer is None else buffer
                    block = buffer[: len(own)].copy_(block)
                yield own + start, block

    def exact(self, query: Array, rows: Array) -> Array:
        """Score rows in float64, (n,); the same two vectors always give the same bits."""
        wide, scores = query.astype(np.float64), np.empty(len(rows))
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards):
            (places,) = np.nonzero(shards == shard)
            for first in range(0, len(places), _EXACT_ROWS):
                some = places[first : first + _EXACT_ROWS]
                vectors = self.parts[shard][rows[some] - self.starts[shard]].astype(np.float64)
                scores[some] = (vectors * wide).sum(1)
        return scores


@dataclass
class _Best:
    """Rows that may be among the k best of each query.

    Attributes:
        asked: (Q, D) the queries.
        k: at most as many as there are rows.
    """

    asked: Tensor
    k: int
    _found: list[tuple[Tensor, Tensor, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        units = (self.asked.shape[1] + _SPARE) * torch.finfo(torch.float32).eps / 2
        # Both the k-th best and its rival may be off.
        self._slack = 2 * _LONGEST * units * torch.linalg.vector_norm(self.asked, dim=1)
        self._top = torch.full((len(self.asked), self.k), -torch.inf)

    @property
    def _floor(self) -> Tensor:
        """(Q,) what a row has to score."""
        floor: Tensor = self._top[:, -1] - self._slack
        return floor

    def add(self, rows: Array, scores: Tensor) -> None:
        """Add the (Q, n) scores of rows."""
        if not self.k:
            return
        scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        active = (scores.amax(1) >= self._floor).nonzero().squeeze(1)
        if not len(active):
            return
        scores = scores[active]
        self._top[active] = torch.cat([self._top[active], scores], 1).topk(self.k).values
        query, place = (scores >= self._floor[active, None]).nonzero(as_tuple=True)
        self._found.append((active[query], scores[query, place], rows[place.numpy()]))

    @property
    def held(self) -> int:
        """How many rows are candidates."""
        return sum(len(rows) for _, _, rows in self._found)

    def keep(self, settled: Sequence[tuple[Array, Array]]) -> None:
        """Replace the candidates of each query by these, given with their scores."""
        counts = torch.tensor([len(rows) for _, rows in settled])
        query = torch.arange(len(settled)).repeat_interleave(counts)
        scores, rows = (np.concatenate([own[n] for own in settled]) for n in (0, 1))
        self._found = [(query, torch.from_numpy(scores), rows)]

    def candidates(self) -> list[Array]:
        """The candidates of each query: all that can be among its k best."""
        if not self._found:
            return [np.empty(0, np.int64) for _ in self.asked]
        query = torch.cat([found[0] for found in self._found])
        scores = torch.cat([found[1] for found in self._found])
        rows = np.concatenate([found[2] for found in self._found])
        kept = (scores >= self._floor[query]).numpy()
        query, rows = query.numpy()[kept], rows[kept]
        order = np.argsort(query, kind="stable")
        stops = np.cumsum(np.bincount(query, minlength=len(self.asked)))
        return np.split(rows[order], stops[:-1])


def _settled(
    stored: _Stored, queries: Array, candidates: Sequence[Array], k: int
) -> list[tuple[Array, Array]]:
    """The k best candidates of each query, best first: their float32 scores and their rows."""
    found = []
    for query, rows in zip(queries, candidates, strict=True):
        scores = stored.exact(query, rows)
        order = np.lexsort((rows, -scores))[:k]
        found.append((scores[order].astype(np.float32), rows[order]))
    return found
