"""All cases, in the order in which they run and are reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cases import (
    both_towers,
    emoji,
    encode,
    flops,
    mixed,
    parity,
    retrieval,
    startup,
    text_lora,
)
from benchmarks.measure import Contestant, Runs
from benchmarks.report import Chapter
from benchmarks.settings import Settings


@dataclass(frozen=True)
class Case:
    """A case: its contestants, and how their results are reported."""

    name: str
    contestants: Callable[[Settings], Sequence[Contestant]]
    report: Callable[[Settings, Runs], Chapter]


CASES = (
    Case("text-lora", text_lora.contestants, text_lora.report),
    Case("text-lora-uniform", text_lora.uniform_contestants, text_lora.uniform_report),
    Case("parity", parity.contestants, parity.report),
    Case("both-towers", both_towers.contestants, both_towers.report),
    Case("emoji", emoji.contestants, emoji.report),
    Case("encode", encode.contestants, encode.report),
    Case("retrieval", retrieval.contestants, retrieval.report),
    Case("mixed", mixed.contestants, mixed.report),
    Case("flops", flops.contestants, flops.report),
    Case("startup", startup.contestants, startup.report),
)
