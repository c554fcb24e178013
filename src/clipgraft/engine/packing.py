"""Captions without padding, and without computing anything twice.

A causal tower's state at a token depends on the tokens up to it alone. So captions that begin alike share the
states of their common beginning (the start token at the least), equal captions share all, and what follows
the pooled token is not computed at all. A batch becomes a list of *nodes*, one for each distinct prefix. Only
attention needs captions as rows of *cells*: it looks their nodes up, in groups of captions of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SAME_GROUP = 0.5
"""Captions at least this long, as a share of the longest of a group, join the group."""

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Captions of similar length.

    Attributes:
        rows: how many.
        width: of the longest; the group has rows · width cells.
        lengths: (rows,) of each.
    """

    rows: int
    width: int
    lengths: Tensor


@dataclass(frozen=True)
class Packed:
    """A batch of captions as N nodes, and as M cells of U distinct captions.

    Attributes:
        tokens, positions: (N,) of every node.
        groups: the distinct captions, the longest first.
        cells: (M,) the node of every cell, group by group and row by row; those after a caption's end hold
            any node.
        places: (N,) for every node the one cell that computes it.
        repeats: (R,) the cells whose node another cell computes.
        shared: (S,) the nodes of those cells, each once.
        slots: (R,) which of `shared` each of `repeats` holds.
        pooled: (U,) the node of every distinct caption's pooled token.
        row_of: (B,) the distinct caption of every caption of the batch.
    """

    tokens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    cells: Tensor
    places: Tensor
    repeats: Tensor
    shared: Tensor
    slots: Tensor
    pooled: Tensor
    row_of: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on a device; copies to a GPU are queued, not waited for."""
        if device == self.tokens.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        groups = tuple(Group(group.rows, group.width, move(group.lengths)) for group in self.groups)
        moved = {f.name: move(getattr(self, f.name)) for f in fields(self) if f.name != "groups"}
        return Packed(groups=groups, **moved)


def pack(tokens: Tensor, ends: Tensor) -> Packed:
    """(B, L) token ids that are pooled at positions `ends`, (B,); all on the CPU."""
    lengths = ends.numpy() + 1
    columns = np.arange(lengths.max())
    ids = np.where(columns < lengths[:, None], tokens.numpy()[:, : len(columns)], -1)
    ids, row_of = _distinct(ids)
    lengths = (ids >= 0).sum(axis=1)
    nodes, new = _nodes(ids)
    node_tokens, node_positions = ids[new], np.nonzero(new)[1]
    by_length = np.argsort(-lengths, kind="stable")
    nodes, new, lengths = nodes[by_length], new[by_length], lengths[by_length]
    groups = _spans(lengths)
    cells, computes, exists = (
        np.concatenate([grid[rows, : lengths[rows.start]].reshape(-1) for rows in groups])
        for grid in (nodes, new, columns < lengths[:, None])
    )
    places = np.empty(len(node_tokens), dtype=np.int64)
    places[cells[computes]] = np.flatnonzero(computes)
    repeats = np.flatnonzero(exists & ~computes)
    shared, slots = np.unique(cells[repeats], return_inverse=True)

    def tensor(array: _Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return Packed(
        tokens=tensor(node_tokens),
        positions=tensor(node_positions),
        groups=tuple(Group(r.stop - r.start, int(lengths[r.start]), tensor(lengths[r])) for r in groups),
        cells=tensor(cells),
        places=tensor(places),
        repeats=tensor(repeats),
        shared=tensor(shared),
        slots=tensor(slots),
        pooled=tensor(nodes[np.arange(len(nodes)), lengths - 1]),
        row_of=tensor(np.argsort(by_length)[row_of]),
    )


def _distinct(ids: _Ints) -> tuple[_Ints, _Ints]:
    """The distinct rows in lexical order, and where each row is among them."""
    order = np.lexsort(ids.T[::-1])
    ordered = ids[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    row_of = np.empty(len(ids), dtype=np.int64)
    row_of[order] = np.cumsum(first) - 1
    return ordered[first], row_of


def _nodes(ids: _Ints) -> tuple[_Ints, _Bools]:
    """The node of every cell of lexically ordered rows, and whether the cell is the first to hold it."""
    differs = np.ones(ids.shape, dtype=bool)
    differs[1:] = np.logical_or.accumulate(ids[1:] != ids[:-1], axis=1)
    new = differs & (ids >= 0)
    numbers = np.cumsum(new).reshape(new.shape) - 1
    # Rows that share a prefix are neighbours: an old cell's node is that of the last new cell above it.
    return np.maximum.accumulate(np.where(new, numbers, 0), axis=0), new


def _spans(lengths: _Ints) -> list[slice]:
    """Neighbours of similar length, in lengths that fall."""
    spans, start = [], 0
    while start < len(lengths):
        stop = start + int(np.count_nonzero(lengths[start:] >= _SAME_GROUP * lengths[start]))
        spans.append(slice(start, stop))
        start = stop
    return spans
