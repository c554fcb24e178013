"""Pack captions without padding, so that nothing is computed twice.

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

from clipgraft.models.device import queued

_SAME_GROUP = 0.5
"""Captions at least this long, as a share of the longest of a group, join the group."""

_NODES, _ROWS, _WIDTH = 8, 8, 8
"""What numbers of nodes, rows and cells in a row are rounded up to."""
_COMPILED_NODES = ((64, 16), (256, 32), (1 << 62, 64))
"""What numbers of nodes up to a bound are rounded up to where CPU kernels are compiled for each new shape.
That takes time and memory: there must be few shapes, however much the sizes of batches differ."""

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Captions of similar length.

    Attributes:
        rows: how many, those that only fill up included.
        width: at least the length of the longest; the group has rows · width cells.
        lengths: (rows,) of each.
    """

    rows: int
    width: int
    lengths: Tensor


@dataclass(frozen=True)
class Packed:
    """A batch of captions as N nodes, and as M cells of U distinct captions.

    Attributes:
        count: how many nodes there are; those after them only fill up, and no caption reads them.
        tokens, positions: (N,) of every node.
        groups: the distinct captions, the longest first.
        cells: (M,) the node of every cell, group by group and row by row; those after a caption's end hold
            any node.
        places: (N,) for every node the one cell that computes it; any for those that fill up.
        repeats: (R,) the cells whose node another cell computes.
        shared: (S,) the nodes of those cells, each once.
        slots: (R,) which of `shared` each of `repeats` holds.
        pooled: (U,) the node of every distinct caption's pooled token, in the order of the groups' rows.
        row_of: (B,) the distinct caption of every caption of the batch.
        shares: for every kind of caption its nodes, and which of `pooled` are its own; kinds share no nodes.
    """

    count: int
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
    shares: tuple[tuple[slice, ...], tuple[Tensor, ...]] = ((), ())

    def to(self, device: torch.device) -> Packed:
        """The same on a device; copies to a GPU are queued, not waited for."""
        if device == self.tokens.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return queued(tensor, device)

        groups = tuple(Group(group.rows, group.width, move(group.lengths)) for group in self.groups)
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: move(value) for name, value in tensors.items() if isinstance(value, Tensor)}
        shares = (self.shares[0], tuple(move(rows) for rows in self.shares[1]))
        return Packed(self.count, groups=groups, shares=shares, **moved)


def pack(tokens: Tensor, ends: Tensor, kinds: Tensor | None = None, compiled: bool = True) -> Packed:
    """(B, L) token ids that are pooled at positions `ends`, (B,); all on the CPU.

    Captions of different `kinds`, (B,) numbers from 0 up in an order that never falls, share nothing.
    `compiled` says that products of a new number of nodes are compiled first.
    """
    lengths = ends.numpy() + 1
    columns = np.arange(lengths.max())
    ids = np.where(columns < lengths[:, None], tokens.numpy()[:, : len(columns)], -1)
    kind = np.zeros(len(ids), dtype=np.int64) if kinds is None else kinds.numpy()
    ids, row_of = _distinct(np.column_stack([kind, ids]))
    kind, ids = ids[:, 0], ids[:, 1:]
    lengths = (ids >= 0).sum(axis=1)
    nodes, new = _nodes(ids, kind)
    node_tokens, node_positions = ids[new], np.nonzero(new)[1]
    by_length = np.argsort(-lengths, kind="stable")
    grids = _Grids(nodes[by_length], new[by_length], lengths[by_length])
    parts = [_fill_up(grids, rows) for rows in _spans(grids.lengths)]
    cells, computes, exists = (
        np.concatenate([getattr(part, name).reshape(-1) for part in parts])
        for name in ("nodes", "new", "exists")
    )
    count = len(node_tokens)
    places = np.zeros(_round_up(count, _step(count) if compiled else _NODES), dtype=np.int64)
    places[cells[computes]] = np.flatnonzero(computes)
    repeats = np.flatnonzero(exists & ~computes)
    shared, slots = np.unique(cells[repeats], return_inverse=True)
    return Packed(
        count=count,
        tokens=_tensor(_resized(node_tokens, len(places))),
        positions=_tensor(_resized(node_positions, len(places))),
        groups=tuple(
            Group(part.nodes.shape[0], part.nodes.shape[1], _tensor(part.lengths)) for part in parts
        ),
        cells=_tensor(cells),
        places=_tensor(places),
        repeats=_tensor(repeats),
        shared=_tensor(shared),
        slots=_tensor(slots),
        pooled=_tensor(np.concatenate([p.nodes[np.arange(len(p.nodes)), p.lengths - 1] for p in parts])),
        row_of=_tensor(_rows_in(parts)[np.argsort(by_length)][row_of]),
        shares=((), ()) if kinds is None else _shares(kind, new, _rows_in(parts)[np.argsort(by_length)]),
    )


def by_mkl(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether MKL multiplies: it compiles nothing for a new shape, and a small product costs little."""
    wide = dtype in (torch.float32, torch.float64)
    return wide and device.type == "cpu" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def _shares(kind: _Ints, new: _Bools, places: _Ints) -> tuple[tuple[slice, ...], tuple[Tensor, ...]]:
    """Return the nodes of each kind, which are neighbours, and its pooled nodes out of `places`."""
    stops = np.cumsum([new[kind == number].sum() for number in range(int(kind.max()) + 1)])
    starts = np.concatenate([[0], stops[:-1]])
    nodes = tuple(slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))
    return nodes, tuple(_tensor(places[kind == number]) for number in range(len(nodes)))


@dataclass(frozen=True)
class _Grids:
    """Distinct captions as rows of cells: their nodes, whether they compute them, and the rows' lengths."""

    nodes: _Ints
    new: _Bools
    lengths: _Ints
    real: int = 0

    @property
    def exists(self) -> _Bools:
        """Cells that hold a token."""
        within: _Bools = np.arange(self.nodes.shape[1]) < self.lengths[:, None]
        return within & (np.arange(len(self.nodes)) < self.real)[:, None]


def _fill_up(grids: _Grids, rows: slice) -> _Grids:
    """Pad the rows of a group to a grid of rounded size; padding holds the first node."""
    real, width = rows.stop - rows.start, int(grids.lengths[rows.start])
    shape = (_round_up(real, _ROWS), _round_up(width, _WIDTH))
    nodes, new = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    nodes[:real, :width], new[:real, :width] = grids.nodes[rows, :width], grids.new[rows, :width]
    lengths = np.ones(shape[0], dtype=np.int64)
    lengths[:real] = grids.lengths[rows]
    return _Grids(nodes, new, lengths, real)


def _rows_in(parts: list[_Grids]) -> _Ints:
    """Return the position of each real row among all rows."""
    starts = np.cumsum([0, *(len(part.nodes) for part in parts)])
    return np.concatenate([start + np.arange(part.real) for start, part in zip(starts, parts, strict=False)])


def _step(count: int) -> int:
    return next(step for bound, step in _COMPILED_NODES if count <= bound)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _resized(array: _Ints, size: int) -> _Ints:
    return np.pad(array, (0, size - len(array)))


def _tensor(array: _Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _distinct(ids: _Ints) -> tuple[_Ints, _Ints]:
    """Return the distinct rows in lexical order, and the position of each row among them."""
    order = np.lexsort(ids.T[::-1])
    ordered = ids[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    row_of = np.empty(len(ids), dtype=np.int64)
    row_of[order] = np.cumsum(first) - 1
    return ordered[first], row_of


def _nodes(ids: _Ints, kind: _Ints) -> tuple[_Ints, _Bools]:
    """The node of every cell of lexically ordered rows, and whether the cell is the first to hold it."""
    differs = np.ones(ids.shape, dtype=bool)
    differs[1:] = np.logical_or.accumulate(ids[1:] != ids[:-1], axis=1)
    differs[1:] |= (kind[1:] != kind[:-1])[:, None]
    new = differs & (ids >= 0)
    numbers = np.cumsum(new).reshape(new.shape) - 1
    # Rows that share a prefix are neighbours: an old cell's node is that of the last new cell above it.
    return np.maximum.accumulate(np.where(new, numbers, 0), axis=0), new


def _spans(lengths: _Ints) -> list[slice]:
    """Split descending lengths into spans of similar length."""
    spans, start = [], 0
    while start < len(lengths):
        stop = start + int(np.count_nonzero(lengths[start:] >= _SAME_GROUP * lengths[start]))
        spans.append(slice(start, stop))
        start = stop
    return spans
