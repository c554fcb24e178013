"""The page that is made of the measurements of a benchmark run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from benchmarks.cases import CASES, retrieval, text_lora
from benchmarks.cases.training import memory_ratio, run_ratio, times, training_table
from benchmarks.contestants.batches import shuffled
from benchmarks.measure import Contestant, ContestantError, run_contestant, spread
from benchmarks.report import at_least, at_most, goals_table, page
from benchmarks.settings import FULL, QUICK

from clipgraft.data.loading import epoch_batches

SETTINGS = dataclasses.replace(FULL, images=640, batch_size=64, epochs=3, run_epochs=3)
PEER = {"step_seconds": [2.0, 9.0, 1.0], "losses": [4.0, 3.0], "trained": 8, "peak_bytes": 4e9}
OURS = {
    "epoch_seconds": [5.0, 1.0, 1.0],
    "run_seconds": 8.0,
    "losses": [4.1, 3.1, 2.0],
    "trained": 8,
    "peak_bytes": 1e9,
}
ENVIRONMENT = {
    "date": "2026-01-01",
    "cpu": "a processor",
    "instructions": ["avx2"],
    "threads": 2,
    "memory_bytes": 2**34,
    "system": "Linux",
    "load": 0.0,
    "python": "3.12",
    "versions": {"torch": "2"},
}


def runs() -> dict[str, list[dict[str, Any]]]:
    loading = {"peak_with_loading_bytes": 5e9}
    slower = {**OURS, "epoch_seconds": [7.0, 2.0, 2.0], "run_seconds": 12.0}
    return {
        text_lora.OURS: [{**OURS, **loading}, {**slower, **loading}],
        text_lora.PEFT: [{**PEER, **loading}],
    }


def test_a_peers_epoch_is_scaled_from_its_median_step_and_ours_is_the_run_itself() -> None:
    """The headline ratio would be wrong."""
    peer = times(runs()[text_lora.PEFT], SETTINGS)
    assert peer.later == spread([20.0])
    assert peer.run == spread([60.0])
    ours = times(runs()[text_lora.OURS], SETTINGS)
    assert ours.first == spread([5.0, 7.0])
    assert ours.run == spread([8.0, 12.0])
    assert run_ratio(runs(), SETTINGS, text_lora.OURS, text_lora.PEFT) == 6.0
    assert memory_ratio(runs(), text_lora.OURS, text_lora.PEFT) == 0.25


def test_a_short_run_is_scaled_to_the_epochs_of_the_table() -> None:
    """The quick run would compare two of our epochs with ten of a peer."""
    settings = dataclasses.replace(SETTINGS, epochs=10)
    ours = times([{**OURS, "run_seconds": 8.0}], settings)
    assert ours.run.median == pytest.approx(5 + 9 * 1 + 1)


def test_table_compares_losses_after_as_many_steps_as_all_took() -> None:
    """Losses of different steps would stand side by side."""
    table = training_table(runs(), SETTINGS, text_lora.OURS)
    assert table.columns[-1] == "loss at step 2"
    assert [row[-1] for row in table.rows] == ["3.1000", "3.0000"]
    assert [row[4] for row in table.rows] == ["1.00x", "6.00x"]


def test_page_says_what_was_reached_missed_and_not_measured() -> None:
    """A missed goal would look like a reached one."""
    chapter = text_lora.report(SETTINGS, runs())
    text = page([chapter], ENVIRONMENT, SETTINGS.as_dict(), ["guide: exit 1"])
    lines = text.splitlines()
    assert f"| text LoRA, 3 epochs from cold: {text_lora.PEFT} | >= 25x | 6.0x | **missed** |" in lines
    assert f"| text LoRA, peak memory as a share of: {text_lora.PEFT} | <= 0.33x | 0.25x | reached |" in lines
    assert f"| text LoRA, 3 epochs from cold: {text_lora.GUIDE} | >= 50x | not measured |  |" in lines
    assert "- guide: exit 1" in lines


def test_goals_are_decided_by_the_number_not_by_how_it_is_rounded() -> None:
    """9.96x would pass as 10.0x."""
    table = goals_table([at_least("a", 10, 9.96), at_most("b", 0.5, 0.5), at_most("c", 0.5, 0.501)])
    assert [row[-1] for row in table.rows] == ["**missed**", "reached", "**missed**"]


@pytest.mark.parametrize("settings", [FULL, QUICK], ids=["full", "quick"])
def test_every_case_reports_even_if_nobody_ran(settings: Any) -> None:
    """One broken peer would cost the results of forty minutes."""
    for case in CASES:
        names = [contestant.name for contestant in case.contestants(settings)]
        assert len(names) == len(set(names))
        assert case.report(settings, {}).title


def test_peers_see_the_same_batches_as_clipgraft() -> None:
    """Losses after a few steps could not be compared."""
    theirs = shuffled(10, 3, seed=5)
    for epoch in range(2):
        for batch in epoch_batches(10, 3, 5, epoch):
            assert next(theirs) == batch.tolist()


def test_metrics_that_two_libraries_both_report_are_compared() -> None:
    """A wrong recall would go unnoticed."""
    ours = {"metrics": {"R@1": 0.5, "mean_rank": 200.0, "only_ours": 1.0}}
    peer = {"metrics": {"R@1": 0.5, "mean_rank": 202.0}}
    assert retrieval.largest_difference(ours, peer) == pytest.approx(2 / 202)


def test_a_contestant_that_fails_says_why() -> None:
    """A run would end without a hint at which peer broke."""
    with pytest.raises(ContestantError, match=r"broken: exit 1: .*no attribute 'nothing'"):
        run_contestant(Contestant("broken", "settings:nothing"), threads=1)
