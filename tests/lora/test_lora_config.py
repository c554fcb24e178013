"""The rank that is chosen for who leaves it to us."""

from __future__ import annotations

import pytest

from clipgraft.lora.config import Task, auto_rank


@pytest.mark.parametrize(
    ("samples", "task", "rank"),
    [
        (1, "classification", 4),
        (9_999, "retrieval", 8),
        (10_000, "retrieval", 16),
        (49_999, "classification", 8),
        (50_000, "retrieval", 32),
        (99_999, "retrieval", 32),
        (100_000, "retrieval", 64),
        (10**7, "classification", 32),
    ],
)
def test_ranks_follow_the_tables(samples: int, task: Task, rank: int) -> None:
    """`--lora-r auto` takes a rank that nobody advises for a data set of this size."""
    chosen, reason = auto_rank(samples, task)
    assert chosen == rank
    assert f"r={rank} for {task} with {samples:,} pairs" in reason
