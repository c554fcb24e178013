"""Summarise what was read, and stop at too many rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from clipgraft.data.table import BadRow, Row
from clipgraft.errors import DataError
from clipgraft.results import Result
from clipgraft.shown import shown_line
from clipgraft.text_tables import Column, Table, aligned, count, table_of

_KEPT = 10  # bad rows that are kept to be shown
_SHOWN = 3  # bad rows that fit into a one-line error
_CHUNK = 4096  # captions tokenized at once
_LISTED = 40  # classes that are listed one by one; beyond, only the largest and smallest are

Fact = tuple[str, int, str]
"""Name, count, and a remark: a line of the summary."""


@dataclass(frozen=True, repr=False, kw_only=True)
class TableReport(Result):
    """Counts that whatever is read has in common.

    Attributes:
        source, kind, unit: what was read, as what, and what a row number counts.
        rows: rows of the table, or images in the folder.
        bad_rows: of those, how many were skipped.
        reasons: why rows were skipped, each with how many, most first.
        first_bad: a few skipped rows.
        notes: choices made for the user.
    """

    source: Path
    kind: str
    unit: str
    rows: int
    bad_rows: int
    reasons: tuple[tuple[str, int], ...] = ()
    first_bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return aligned text, one line a fact; a line about a problem says what to do."""
        problems = [(name, count, advice if count else "") for name, count, advice in self._problems()]
        lines = [f"{self.source} ({self.kind})", *(f"  note: {note}" for note in self.notes)]
        lines += [*fact_lines([*self._facts(), *problems]), *self._more()]
        if len(self.reasons) > 1:
            lines.append("  why rows were skipped:")
            lines += [f"  {line}" for line in fact_lines([(why, count, "") for why, count in self.reasons])]
        if self.first_bad:
            more = ", the first of each image" if self.bad_rows > len(self.first_bad) else ""
            lines.append(f"  skipped rows{more}:")
            lines += [f"    {describe_row(row, self.unit)}" for row in self.first_bad]
        return "\n".join(lines)

    def table(self) -> Table:
        """The facts of the summary."""
        columns = (Column("", left=True), Column("count", count), Column("remark", left=True))
        facts = [*self._facts(), *((n, c, advice if c else "") for n, c, advice in self._problems())]
        return table_of(f"{self.source} ({self.kind})", columns, facts, " ".join(self.notes))

    def _facts(self) -> list[Fact]:
        used = f"{self.rows - self.bad_rows:,} of them used" if self.bad_rows else ""
        return [("rows", self.rows, used)]

    def _problems(self) -> list[Fact]:
        listed = "listed below; `strict` stops at the first, `max_bad_rows` limits them"
        return [("skipped rows", self.bad_rows, listed)]

    def _more(self) -> list[str]:
        """Return lines between facts and skipped rows."""
        return []


@dataclass(frozen=True, repr=False, kw_only=True)
class DataReport(TableReport):
    """Counts that images with captions and images with labels have in common.

    Attributes:
        images: usable ones.
        missing_images: names of files that are not there, each once however many rows name it.
        unreadable_images: files that are no whole images.
        duplicates: groups of files with the same bytes.
    """

    images: int
    missing_images: int = 0
    unreadable_images: int = 0
    duplicates: tuple[tuple[Path, ...], ...] = ()

    @property
    def duplicate_images(self) -> int:
        """Count images whose bytes are those of an earlier image."""
        return sum(len(group) - 1 for group in self.duplicates)

    def _facts(self) -> list[Fact]:
        return [*super()._facts(), ("images", self.images, "")]

    def _problems(self) -> list[Fact]:
        same = f"same file under several names ({_equal(self.duplicates)})"
        return [
            *super()._problems(),
            ("missing images", self.missing_images, "skipped: correct the paths, or add the files"),
            ("unreadable images", self.unreadable_images, "skipped: replace the files listed below"),
            (
                "duplicate images",
                self.duplicate_images,
                same,
            ),
        ]


@dataclass(frozen=True, repr=False, kw_only=True)
class PairReport(DataReport):
    """Counts of images with captions.

    Attributes:
        captions: those that are kept.
        fewest_captions, most_captions: of one image.
        empty_captions, null_captions: left out: empty, and nan, None or the like.
        repeated_captions: same words for the same image, of which each is kept once.
        long_captions: those of more tokens than `context_length`, where they were counted.
    """

    _shows = ("source", "kind", "rows", "bad_rows", "images", "captions", "missing_images", "notes")

    captions: int
    fewest_captions: int
    most_captions: int
    empty_captions: int = 0
    null_captions: int = 0
    repeated_captions: int = 0
    long_captions: int | None = None
    context_length: int | None = None

    def with_long_captions(
        self,
        captions: Sequence[str],
        count_tokens: Callable[[Sequence[str]], Sequence[int]],
        context_length: int,
    ) -> PairReport:
        """Return the report with the number of captions that have more tokens than the model reads."""
        found = count_long_captions(captions, count_tokens, context_length)
        return replace(self, long_captions=found, context_length=context_length)

    def _facts(self) -> list[Fact]:
        mean = self.captions / max(self.images, 1)
        spread = f"{self.fewest_captions} to {self.most_captions} an image, {mean:.2f} on average"
        if self.fewest_captions == self.most_captions:
            spread = f"{self.fewest_captions} an image"
        return [*super()._facts(), ("captions", self.captions, spread)]

    def _problems(self) -> list[Fact]:
        skipped, *images, duplicate = super()._problems()
        nulls = "left out as captions: `keep_nulls` takes them"
        repeated = "same words for the same image: each was kept once"
        problems = [
            skipped,
            ("empty captions", self.empty_captions, "left out: write them, or leave it so"),
            ("nan, None and the like", self.null_captions, nulls),
            ("repeated captions", self.repeated_captions, repeated),
            *images,
            (*duplicate[:2], f"{duplicate[2]}: give all their captions to one"),
        ]
        if self.long_captions is not None and self.context_length is not None:
            problems.append(long_texts("captions", self.long_captions, self.context_length))
        return problems


@dataclass(frozen=True, repr=False, kw_only=True)
class LabelReport(DataReport):
    """Counts of images with one class each.

    Attributes:
        classes, counts: names and numbers of usable images.
        empty_classes: classes that are left out because no image of theirs can be used.
        mixed_duplicates: those of `duplicates` whose files have different labels.
    """

    _shows = ("source", "kind", "rows", "bad_rows", "images", "classes", "missing_images", "notes")

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    empty_classes: tuple[str, ...] = ()
    mixed_duplicates: tuple[tuple[Path, ...], ...] = ()

    @property
    def imbalance(self) -> float:
        """Return the size of the largest class divided by that of the smallest."""
        return max(self.counts) / min(self.counts)

    def _facts(self) -> list[Fact]:
        ordered = self._by_size()
        (largest, most), (smallest, fewest) = ordered[0], ordered[-1]
        ratio = (
            f"{self.imbalance:.1f} times the smallest" if most > fewest else "all classes are the same size"
        )
        advice = "; class weights can balance this" if self.imbalance >= 3 else ""
        return [
            *super()._facts(),
            ("classes", len(self.classes), f"{self.images / len(self.classes):.1f} images on average"),
            ("largest class", most, f"{largest}, {ratio}{advice}"),
            ("smallest class", fewest, smallest),
        ]

    def _problems(self) -> list[Fact]:
        *images, duplicate = super()._problems()
        names = ", ".join(self.empty_classes[:10]) + (", ..." if len(self.empty_classes) > 10 else "")
        problems = [*images, ("empty classes", len(self.empty_classes), f"left out: {names}"), duplicate]
        if self.mixed_duplicates:
            count = sum(len(group) for group in self.mixed_duplicates)
            advice = f"{_equal(self.mixed_duplicates)}: one file cannot show both, remove one"
            problems.append(("of these in two classes", count, advice))
        return problems

    def _more(self) -> list[str]:
        ordered = self._by_size()
        half = _LISTED // 2
        shown = ordered if len(ordered) <= _LISTED else ordered[:half] + ordered[-half:]
        lines = fact_lines([(name, count, "") for name, count in shown])
        if shown is not ordered:
            lines.insert(half, f"  ... {len(ordered) - 2 * half:,} more ...")
        return ["  images of each class:", *(f"  {line}" for line in lines)]

    def _by_size(self) -> list[tuple[str, int]]:
        return sorted(zip(self.classes, self.counts, strict=True), key=lambda pair: -pair[1])


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How a tokenizer splits source texts and their translations.

    Attributes:
        source, target: tokens for each word of the source texts, without start and end.
        long_targets: translations of more tokens than `context_length`.
    """

    source: float
    target: float
    long_targets: int
    context_length: int

    @property
    def ratio(self) -> float:
        """Return how many times the tokens of the source a translation takes."""
        return self.target / self.source

    def __str__(self) -> str:
        return (
            f"tokens for each word of the source: {self.source:.2f} in the source, {self.target:.2f} in the "
            f"translation ({self.ratio:.1f} times)"
        )


@dataclass(frozen=True, repr=False, kw_only=True)
class TranslationReport(TableReport):
    """Counts of texts with their translations.

    Attributes:
        sources, targets: different source texts, and translations of them that are kept.
        empty_targets, null_targets: translations left out: empty, and nan, None or the like.
        repeated_targets: same translation of the same text, of which each is kept once.
        untranslated: translations that are the source text itself; they are kept.
        tokens: how the tokenizer splits both, where they were counted.
    """

    _shows = ("source", "kind", "rows", "bad_rows", "sources", "targets", "notes")

    sources: int
    targets: int
    empty_targets: int = 0
    null_targets: int = 0
    repeated_targets: int = 0
    untranslated: int = 0
    tokens: Tokens | None = None

    def _facts(self) -> list[Fact]:
        return [*super()._facts(), ("source texts", self.sources, ""), ("translations", self.targets, "")]

    def _problems(self) -> list[Fact]:
        problems = [
            *super()._problems(),
            ("empty translations", self.empty_targets, "left out: write them, or leave it so"),
            (
                "nan, None and the like",
                self.null_targets,
                "left out: `keep_nulls` takes them as translations",
            ),
            ("repeated translations", self.repeated_targets, "of the same text: each was kept once"),
            ("untranslated", self.untranslated, "the same as their source: kept, check that this is meant"),
        ]
        if self.tokens is not None:
            problems.append(long_texts("translations", self.tokens.long_targets, self.tokens.context_length))
        return problems

    def _more(self) -> list[str]:
        return [] if self.tokens is None else [f"  {self.tokens}"]


class BadRows:
    """Counts the rows that cannot be used, by reason, keeps the first few, and stops at too many."""

    def __init__(self, source: Path, unit: str, *, strict: bool, limit: int | None) -> None:
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
            how = "correct the row, or leave out `strict` to skip such rows"
            raise DataError(f"{self._source}: {describe_row(row, self._unit)}; {how}")
        if self._limit is not None and self.count > self._limit:
            raise DataError(
                f"{self._source}: more than {self._limit:,} rows cannot be used ({self.examples()}); "
                f"correct them, or allow more with `max_bad_rows`"
            )

    def _told(self, row: BadRow) -> bool:
        """Tell whether this fault of this image is kept: a lost image with five captions is five bad rows."""
        kept = {(kept.image, kept.reason) for kept in self.first}
        return bool(row.image) and (row.image, row.reason) in kept

    def examples(self) -> str:
        """Describe the first few on one line."""
        return "; ".join(describe_row(row, self._unit) for row in self.first[:_SHOWN])


class Remarks:
    """Counts rows that are used, but perhaps not as a person meant them, by remark."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, row: Row) -> None:
        """Count a row that has a remark."""
        self._counts[row.remark] += 1
        self._first.setdefault(row.remark, row.number)

    def notes(self) -> tuple[str, ...]:
        """Return one line for each remark."""
        return tuple(
            f"{count:,} rows {remark} (the first is {self._unit} {self._first[remark]})"
            for remark, count in self._counts.most_common()
        )


def count_long_captions(
    captions: Sequence[str], count_tokens: Callable[[Sequence[str]], Sequence[int]], context_length: int
) -> int:
    """Count the captions that have more tokens than the model reads.

    `count_tokens` returns the length of each caption in tokens, start and end tokens included and nothing cut
    off.
    """
    rest, long = iter(captions), 0
    while chunk := list(islice(rest, _CHUNK)):
        long += sum(count > context_length for count in count_tokens(chunk))
    return long


def long_texts(what: str, count: int, context_length: int) -> Fact:
    """Say how many texts have more tokens than the model reads."""
    unseen = f"words after token {context_length} are not seen"
    return f"{what} over {context_length} tokens", count, f"{unseen}: shorten them or put what matters first"


def fact_lines(facts: Sequence[Fact]) -> list[str]:
    """Write facts as indented lines with names and counts in columns."""
    rows = [(f"  {name}", f"{count:,}", remark) for name, count, remark in facts]
    return aligned(rows, left=(0, 2))


def describe_row(row: BadRow, unit: str) -> str:
    """Describe a bad row: `line 7: a.jpg not found in data`."""
    return " ".join(
        part for part in (f"{unit} {row.number}:", shown_line(row.image, 200), row.reason) if part
    )


def _equal(groups: Sequence[tuple[Path, ...]]) -> str:
    """Name the first group of equal files, with their folders where these differ."""
    if not groups:
        return ""
    alike = len({path.parent for path in groups[0]}) == 1
    return " = ".join(path.name if alike else f"{path.parent.name}/{path.name}" for path in groups[0][:3])
