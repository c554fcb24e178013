"""The summary that a person reads before training, and the limit on rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from clipgraft.data.rows import BadRow, Row
from clipgraft.errors import ConfigError, DataError
from clipgraft.results import Result
from clipgraft.shown import shown_line
from clipgraft.text_tables import aligned

MAX_BAD_ROWS = 100
_KEPT = 10  # bad rows that are kept to be shown
_SHOWN = 3  # bad rows that fit into a one-line error
_CHUNK = 4096  # captions tokenized at once


@dataclass(frozen=True)
class DataReport(Result):
    """Counts of one dataset. Rows are the table's; an image is missing once however many rows name it."""

    source: Path
    kind: str
    unit: str
    rows: int
    bad_rows: int
    images: int
    captions: int
    fewest_captions: int
    most_captions: int
    empty_captions: int
    repeated_captions: int
    missing_images: int
    unreadable_images: int
    duplicates: tuple[tuple[Path, ...], ...]
    first_bad: tuple[BadRow, ...]
    notes: tuple[str, ...] = ()
    null_captions: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    long_captions: int | None = None
    context_length: int | None = None

    def __repr__(self) -> str:
        return format_report(self)

    @property
    def duplicate_images(self) -> int:
        """Images whose bytes are also those of another image that comes before them."""
        return sum(len(group) - 1 for group in self.duplicates)


class BadRows:
    """Counts the rows that cannot be used, by reason, keeps the first few, and stops at too many."""

    def __init__(self, source: Path, unit: str, *, strict: bool, limit: int | None) -> None:
        if limit is not None and limit < 0:
            raise ConfigError(f"--max-bad-rows must be 0 or more: got {limit}")
        self._source = source
        self._unit = unit
        self._strict = strict
        self._limit = limit
        self.count = 0
        self.first: list[BadRow] = []
        self.reasons: Counter[str] = Counter()

    def add(self, row: BadRow) -> None:
        """Count one more. Raises DataError under `strict`, or when there are more than the limit."""
        self.count += 1
        self.reasons[row.kind or row.reason] += 1
        if len(self.first) < _KEPT and not self._told(row):
            self.first.append(row)
        if self._strict:
            how = "correct the row, or leave out --strict to skip such rows"
            raise DataError(f"{self._source}: {describe_row(row, self._unit)}; {how}")
        if self._limit is not None and self.count > self._limit:
            raise DataError(
                f"{self._source}: more than {self._limit:,} rows cannot be used ({self.examples()}); "
                f"correct them, or allow more with --max-bad-rows"
            )

    def _told(self, row: BadRow) -> bool:
        """Whether this fault of this image is kept: a lost image with five captions is five bad rows."""
        kept = {(kept.image, kept.reason) for kept in self.first}
        return bool(row.image) and (row.image, row.reason) in kept

    def examples(self) -> str:
        """The first few, on one line."""
        return "; ".join(describe_row(row, self._unit) for row in self.first[:_SHOWN])


class Remarks:
    """Counts rows that are used, but perhaps not as a person meant them, by remark."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, row: Row) -> None:
        """Count a row, where it has a remark."""
        if row.remark:
            self._counts[row.remark] += 1
            self._first.setdefault(row.remark, row.number)

    def notes(self) -> tuple[str, ...]:
        """One line for each remark."""
        return tuple(
            f"{count:,} rows {remark} (the first is {self._unit} {self._first[remark]})"
            for remark, count in self._counts.most_common()
        )


def count_long_captions(
    captions: Sequence[str], count_tokens: Callable[[Sequence[str]], Sequence[int]], context_length: int
) -> int:
    """How many captions have more tokens than the model reads.

    `count_tokens` returns the length of each caption in tokens, start and end tokens included and nothing cut
    off.
    """
    rest, long = iter(captions), 0
    while chunk := list(islice(rest, _CHUNK)):
        long += sum(count > context_length for count in count_tokens(chunk))
    return long


def with_long_captions(report: DataReport, long_captions: int, context_length: int) -> DataReport:
    """The same report, with the number of captions that are longer than `context_length` tokens."""
    return replace(report, long_captions=long_captions, context_length=context_length)


def format_report(report: DataReport) -> str:
    """The report as aligned text, one line a fact; a line that tells of a problem says what to do."""
    lines = [f"{report.source} ({report.kind})", *(f"  note: {note}" for note in report.notes)]
    lines += fact_lines(_facts(report))
    if len(report.reasons) > 1:
        lines.append("  why rows were skipped:")
        lines += [f"  {line}" for line in fact_lines([(why, count, "") for why, count in report.reasons])]
    if report.first_bad:
        more = ", the first of each image" if report.bad_rows > len(report.first_bad) else ""
        lines.append(f"  skipped rows{more}:")
        lines += [f"    {describe_row(row, report.unit)}" for row in report.first_bad]
    return "\n".join(lines)


def fact_lines(facts: Sequence[tuple[str, int, str]]) -> list[str]:
    """(name, count, remark) as indented lines with names and counts in columns."""
    rows = [(f"  {name}", f"{count:,}", remark) for name, count, remark in facts]
    return aligned(rows, left=(0, 2))


def _facts(report: DataReport) -> list[tuple[str, int, str]]:
    mean = report.captions / max(report.images, 1)
    spread = f"{report.fewest_captions} to {report.most_captions} an image, {mean:.2f} on average"
    if report.fewest_captions == report.most_captions:
        spread = f"{report.fewest_captions} an image"
    facts = [
        ("rows", report.rows, f"{report.rows - report.bad_rows:,} of them used" if report.bad_rows else ""),
        ("images", report.images, ""),
        ("captions", report.captions, spread),
    ]
    facts += [(name, count, advice if count else "") for name, count, advice in _problems(report)]
    return facts


def _problems(report: DataReport) -> list[tuple[str, int, str]]:
    problems = [
        (
            "skipped rows",
            report.bad_rows,
            "listed below; --strict stops at the first, --max-bad-rows limits them",
        ),
        ("empty captions", report.empty_captions, "left out: write them, or leave it so"),
        ("nan, None and the like", report.null_captions, "left out as captions: --keep-nulls takes them"),
        ("repeated captions", report.repeated_captions, "same words for the same image: each was kept once"),
        ("missing images", report.missing_images, "skipped: correct the paths, or add the files"),
        ("unreadable images", report.unreadable_images, "skipped: replace the files listed below"),
        ("duplicate images", report.duplicate_images, _duplicates_advice(report)),
    ]
    if report.long_captions is not None:
        advice = (
            f"words after token {report.context_length} are not seen: shorten them or put what matters first"
        )
        problems.append((f"captions over {report.context_length} tokens", report.long_captions, advice))
    return problems


def _duplicates_advice(report: DataReport) -> str:
    if not report.duplicates:
        return ""
    same = " = ".join(path.name for path in report.duplicates[0][:3])
    return f"same file under several names ({same}): give all their captions to one"


def describe_row(row: BadRow, unit: str) -> str:
    """`line 7: a.jpg not found in data`: where, which image, why."""
    return " ".join(
        part for part in (f"{unit} {row.number}:", shown_line(row.image, 200), row.reason) if part
    )
