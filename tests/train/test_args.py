"""What a run decides for itself where it is not told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import clipgraft as cg


@given(rows=st.integers(64, 10**7), processes=st.integers(1, 8), accum=st.integers(1, 4))
def test_epochs_follow_the_number_of_pairs(rows: int, processes: int, accum: int) -> None:
    """Few pairs would be seen too rarely to be learnt, or many for hours."""
    args = cg.TrainArgs(accum_freq=accum)
    epochs = args.for_pairs(rows, processes).planned_epochs
    steps = max(1, rows // (64 * accum * processes))
    assert 3 <= epochs <= 15
    if 3 < epochs < 15:
        assert epochs * steps >= 1000 > (epochs - 1) * steps


def test_what_is_given_stays() -> None:
    """`epochs=7` would be another number on a large table."""
    assert cg.TrainArgs(epochs=7).for_pairs(10**6).epochs == 7
    assert cg.TrainArgs(epoch_parts=(2, 3)).for_pairs(10**6).parts == (2, 3)
