"""What the machine's own speed decides about a benchmark's measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from benchmarks.measure import Contestant, ContestantError, measure, spread
from benchmarks.noise import Watch, moved, noise
from benchmarks.probe import speed
from benchmarks.report import with_spread


def watch_of(*speeds: float, retries: int = 2) -> Watch:
    """A watch whose probe gives these speeds, one after another; bf16 is as fast at every probe."""
    given: Iterator[float] = iter(speeds)
    return Watch(lambda: {"fp32": next(given), "bf16": 900.0}, retries, lambda line: None)


def numbered() -> Any:
    """A measurement that gives the number of its attempt."""
    attempts = iter(range(1, 99))
    return lambda: next(attempts)


def test_a_quiet_measurement_counts_at_once() -> None:
    """A benchmark would take twice as long for nothing."""
    watch = watch_of(100, 91)
    assert watch.run("a", numbered()) == 1
    assert watch.seen == [
        {"name": "a", "tries": [[{"fp32": 100, "bf16": 900.0}, {"fp32": 91, "bf16": 900.0}]]}
    ]


@pytest.mark.parametrize("after", [80, 130])
def test_a_measurement_is_repeated_when_the_speed_moved_by_more_than_a_tenth(after: float) -> None:
    """A time that another program disturbed would be published."""
    watch = watch_of(100, after, 100, 99)
    assert watch.run("a", numbered()) == 2
    assert "1 were repeated because it moved by more than 10%: a. 0 stayed disturbed." in noise(watch.seen)


def test_repeating_ends_and_keeps_the_least_disturbed_attempt() -> None:
    """A busy machine would hold a benchmark for ever, or the worst of its times would be shown."""
    watch = watch_of(100, 50, 100, 85, 100, 70)
    assert watch.run("a", numbered()) == 2
    assert len(watch.seen[0]["tries"]) == 3
    assert noise(watch.seen).endswith("1 stayed disturbed: a.")


def test_no_retries_still_say_what_was_disturbed() -> None:
    """A quick run would look quiet."""
    watch = watch_of(100, 50, retries=0)
    assert watch.run("a", numbered()) == 1
    assert "0 were repeated because it moved by more than 10%. 1 stayed disturbed: a." in noise(watch.seen)


def test_page_says_how_far_the_speed_moved_over_the_whole_run() -> None:
    """A machine that slowed down between two contestants would go unseen."""
    watch = watch_of(100, 100, 50, 50, 80, 80)
    for name in ("a", "b", "b"):
        watch.run(name, numbered())
    text = noise(watch.seen)
    assert "80 GFLOP/s in fp32 (50 to 100) and 900 GFLOP/s in bf16 (900 to 900)" in text
    assert "over the whole run the machine's speed moved by 50%" in text
    assert "0 were repeated" in text
    assert noise([]) == ""


def test_the_type_that_moved_most_counts() -> None:
    """bf16 could lose half its speed unseen."""
    assert moved([{"fp32": 100.0, "bf16": 900.0}, {"fp32": 99.0, "bf16": 450.0}]) == 0.5


def test_rounds_are_interleaved_and_a_failed_contestant_is_left_out() -> None:
    """A slow minute would fall on one contestant alone, or a broken peer would end the run."""
    order = []

    def run(contestant: Contestant) -> dict[str, Any]:
        order.append(contestant.name)
        if contestant.name == "broken":
            raise ContestantError("broken: exit 1")
        return {"process_seconds": 1.0, "number": len(order)}

    contestants = [Contestant("a", "x:y"), Contestant("broken", "x:y"), Contestant("once", "x:y", repeats=1)]
    watch = Watch(lambda: {"fp32": 1.0}, 2, lambda line: None)
    found, failures = measure(contestants, 3, run, watch, lambda line: None)
    assert order == ["a", "broken", "once", "a", "a"]
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "once": 1}
    assert failures == ["broken: exit 1"]
    assert [one["name"] for one in watch.seen] == ["a", "once", "a", "a"]


def test_speed_is_that_of_the_median_product() -> None:
    """One hiccup of a probe would call a quiet contestant disturbed."""
    moments = iter([0.0, 0.05, 0.1, 9.0])
    assert speed(lambda: None, 1e9, lambda: next(moments)) == pytest.approx(20)


def test_tables_show_the_median_with_the_lowest_and_the_highest() -> None:
    """Noise would be hidden behind one number."""
    assert with_spread(spread([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"
    assert with_spread(spread([3.0])) == "3.00"
