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
    assert len(batch.tokens) == len(prefixes)
    assert len(rows_of(batch)) == len({tuple(caption) for caption in rows})


@given(captions)
def test_every_node_is_computed_by_one_cell(rows: Captions) -> None:
    """A state is read from a cell that never computed it, or its gradient is lost or counted twice."""
    batch = packed(rows)
    assert batch.cells[batch.places].tolist() == list(range(len(batch.tokens)))
    held = torch.tensor([node for row in rows_of(batch) for node in row])
    told = torch.cat([batch.cells[batch.places], batch.cells[batch.repeats]])
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
    assert len(batch.tokens) <= words
    assert len(batch.cells) <= words
