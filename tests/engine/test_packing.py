"""Packed captions hold every prefix once, and every caption whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.engine.packing import Packed, pack

Captions = list[list[int]]
captions = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12)


def packed(rows: Captions) -> Packed:
    tokens = torch.full((len(rows), 12), 7)
    for row, caption in enumerate(rows):
        tokens[row, : len(caption)] = torch.tensor(caption)
    return pack(tokens, torch.tensor([len(caption) - 1 for caption in rows]))


def rows_of(batch: Packed) -> list[list[int]]:
    """The nodes of every distinct caption, from the cells."""
    found, start = [], 0
    for group in batch.groups:
        grid = batch.cells[start : start + group.rows * group.width].view(group.rows, group.width)
        start += group.rows * group.width
        found += [row[:length].tolist() for row, length in zip(grid, group.lengths.tolist(), strict=True)]
    assert start == len(batch.cells)
    return found


@given(captions)
def test_every_caption_is_there_token_by_token(rows: Captions) -> None:
    """A caption is encoded with another caption's words."""
    batch = packed(rows)
    distinct = rows_of(batch)
    for caption, row in zip(rows, batch.row_of.tolist(), strict=True):
        nodes = distinct[row]
        assert batch.tokens[nodes].tolist() == caption
        assert batch.positions[nodes].tolist() == list(range(len(caption)))
        assert batch.pooled[row] == nodes[-1]


@given(captions)
def test_every_prefix_is_a_node_once(rows: Captions) -> None:
    """Words that captions share are computed again and again."""
    batch = packed(rows)
    prefixes = {tuple(caption[: end + 1]) for caption in rows for end in range(len(caption))}
    assert batch.count == len(prefixes)
    assert len(set(batch.row_of.tolist())) == len({tuple(caption) for caption in rows})


@given(captions)
def test_every_node_is_computed_by_one_cell(rows: Captions) -> None:
    """A state is read from a cell that never computed it, or its gradient is lost or counted twice."""
    batch = packed(rows)
    computed = batch.cells[batch.places[: batch.count]]
    assert computed.tolist() == list(range(batch.count))
    distinct = rows_of(batch)
    held = torch.tensor([node for row in set(batch.row_of.tolist()) for node in distinct[row]])
    told = torch.cat([computed, batch.cells[batch.repeats]])
    assert told.sort().values.equal(held.sort().values)
    assert batch.shared[batch.slots].equal(batch.cells[batch.repeats])
    assert len(batch.shared.unique()) == len(batch.shared)


def test_one_long_caption_does_not_cost_a_batch_of_long_ones() -> None:
    """One 60-token caption among 15-token ones makes the step four times as slow."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 1000, (15,), generator=generator).tolist() for _ in range(63)]
    rows.append(torch.randint(0, 1000, (60,), generator=generator).tolist())
    tokens = torch.zeros(64, 77, dtype=torch.long)
    for row, caption in enumerate(rows):
        tokens[row, : len(caption)] = torch.tensor(caption)
    batch = pack(tokens, torch.tensor([len(caption) - 1 for caption in rows]))
    words = sum(map(len, rows))
    assert len(batch.tokens) <= words + 64
    assert len(batch.cells) <= 64 * 16 + 8 * 64


@given(captions)
def test_shapes_repeat_from_batch_to_batch(rows: Captions) -> None:
    """Every step compiles kernels for its own shapes: slow, and memory grows until the run is killed."""
    batch = packed(rows)
    assert len(batch.places) == (count := len(batch.tokens))
    assert count % (16 if count <= 64 else 32 if count <= 256 else 64) == 0
    assert all(group.rows % 8 == group.width % 8 == 0 for group in batch.groups)
    assert len(batch.pooled) == sum(group.rows for group in batch.groups)
