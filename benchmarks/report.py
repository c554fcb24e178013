"""Turn measurements into a page of Markdown. Nothing is measured here, so a page can be rendered again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Spread
from benchmarks.noise import Seen, noise


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is aligned left, the others right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Goal:
    """One number to reach.

    Attributes:
        what: what is compared with what.
        wanted: the number as text, such as ">= 10x".
        measured: what was found; None where it was not measured.
        met: whether that is enough.
    """

    what: str
    wanted: str
    measured: str | None
    met: bool


@dataclass(frozen=True)
class Bars:
    """One bar a contestant, drawn by `benchmarks.plots`."""

    file: str
    title: str
    unit: str
    bars: Mapping[str, float]
    logarithmic: bool = False


@dataclass(frozen=True)
class Chapter:
    """The report of one case."""

    title: str
    text: str
    tables: tuple[Table, ...] = ()
    goals: tuple[Goal, ...] = ()
    plots: tuple[Bars, ...] = ()


def at_least(what: str, wanted: float, measured: float | None) -> Goal:
    """Make a goal for a ratio of `wanted` or more."""
    text = None if measured is None else f"{measured:.1f}x"
    return Goal(what, f">= {wanted:g}x", text, measured is not None and measured >= wanted)


def at_most(what: str, wanted: float, measured: float | None, unit: str = "x") -> Goal:
    """Make a goal for a number of `wanted` or less."""
    text = None if measured is None else f"{measured:.2g}{unit}"
    return Goal(what, f"<= {wanted:.2g}{unit}", text, measured is not None and measured <= wanted)


def markdown_table(table: Table) -> str:
    lines = [
        "| " + " | ".join(table.columns) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return "\n".join(lines)


def goals_table(goals: Sequence[Goal]) -> Table:
    """Format all goals with what was measured, in one table."""
    rows = tuple((goal.what, goal.wanted, goal.measured or "not measured", _verdict(goal)) for goal in goals)
    return Table(("goal", "wanted", "measured", ""), rows)


def _verdict(goal: Goal) -> str:
    if goal.measured is None:
        return ""
    return "reached" if goal.met else "**missed**"


def page(
    chapters: Sequence[Chapter],
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    failures: Sequence[str],
    seen: Sequence[Seen] = (),
) -> str:
    """Format the whole report; `seen` are the measurements of `noise.Watch`."""
    size = "quick run: sizes are small and nothing is repeated" if settings["quick"] else "full run"
    parts = [
        "# Benchmarks",
        f"clipgraft beside its peers in one process tree, {environment['date']}, {size}. Every contestant "
        "runs in a fresh process, one after another, in rounds; all start from the same random ViT-B-32 "
        "and see the same images, captions, batches and number of threads. Times and ratios are medians of "
        "the rounds, the lowest and the highest in brackets where there are several rounds. Memory is the "
        "largest resident set of the contestant's main process, its loader workers not counted.",
        machine(environment),
        noise(seen),
    ]
    goals = [goal for chapter in chapters for goal in chapter.goals]
    if goals:
        parts += ["## Goals", markdown_table(goals_table(goals))]
    for chapter in chapters:
        parts += [f"## {chapter.title}", chapter.text, *map(markdown_table, chapter.tables)]
        parts += [f"![{bars.title}]({bars.file})" for bars in chapter.plots]
    if failures:
        parts += ["## Did not run", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine(environment: Mapping[str, Any]) -> str:
    """Format processor and versions, two lines."""
    flags = ", ".join(environment["instructions"])
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return (
        f"{environment['cpu']} ({flags}), {environment['threads']} threads, "
        f"{environment['memory_bytes'] / 2**30:.0f} GiB, {environment['system']}, load before the run "
        f"{environment['load']:.1f}.  \nPython {environment['python']}, {versions}."
    )


def with_spread(found: Spread, format_number: Callable[[float], str] | None = None) -> str:
    """Format a median with the lowest and the highest, such as `3.14 (3.02 to 3.20)`."""
    text = format_number or short
    if found.count == 1:
        return text(found.median)
    return f"{text(found.median)} ({text(found.low)} to {text(found.high)})"


def short(number: float) -> str:
    """Format three digits, without exponent."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"
