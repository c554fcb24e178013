"""Texts with their translations: read from a table, counted, and held out in parts."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipgraft.data.args import TranslationArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.doors import open_table
from clipgraft.data.summary import BadRows, Remarks, Tokens, TranslationReport
from clipgraft.data.table import TRANSLATIONS, BadRow, Row, Table
from clipgraft.errors import ConfigError, DataError

log = logging.getLogger("clipgraft")
MANY_TOKENS = 2.5
"""Times the tokens of the source, from which on a tokenizer has no words of a language, but its bytes."""
_HELD_OUT, _MOST_HELD_OUT = 0.1, 1_000


@dataclass(frozen=True)
class Translations:
    """Texts that a model understands, and their translations: `targets[i]` belong to `sources[i]`.

    Attributes:
        sources: different texts.
        targets: one or more translations of each, of one language or of several.
        report: what was read and what was skipped, where `read_translations` read them.
    """

    sources: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...]
    report: TranslationReport | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.sources)

    def as_pairs(self, *, with_source: bool = False) -> Pairs:
        """Return pairs in which each source text stands where an image does: its name alone, no file.

        `with_source` makes each source text one of its own translations.
        """
        captions = (
            (*texts, source) if with_source and source not in texts else texts
            for source, texts in zip(self.sources, self.targets, strict=True)
        )
        return Pairs(tuple(map(Path, self.sources)), tuple(captions))

    def count_tokens(self, count: Callable[[Sequence[str]], Sequence[int]], context_length: int) -> Tokens:
        """Count how a tokenizer splits both sides.

        Args:
            count: gives the tokens of each text, start and end included and nothing cut off.
            context_length: tokens that the model reads.
        """
        targets = [text for texts in self.targets for text in texts]
        of_sources, of_targets = (count(texts) for texts in (self.sources, targets))
        words = [max(1, len(text.split())) for text in self.sources]
        words_of_targets = sum(n * len(texts) for n, texts in zip(words, self.targets, strict=True))
        return Tokens(
            source=max(1, sum(of_sources) - 2 * len(of_sources)) / sum(words),
            target=(sum(of_targets) - 2 * len(of_targets)) / words_of_targets,
            long_targets=sum(tokens > context_length for tokens in of_targets),
            context_length=context_length,
        )


def read_translations(
    source: str | Path, args: TranslationArgs | None = None, **options: Any
) -> Translations:
    """Read a table with a column of texts and one or more of their translations.

    Tables are those of `read_pairs`: CSV, TSV, JSON, Parquet, spreadsheets, and SQLite or DuckDB files. Rows
    with the same source text are one text with several translations. A row is bad, and is skipped, when it
    cannot be parsed, or lacks one of its sides. `translations.report` tells what was read and what was
    skipped.

    Args:
        source: the file.
        args: which columns are read, how the file is written, and how many bad rows are skipped.
        **options: single fields of `TranslationArgs`, such as `csv_target_key="vi"`, in place of those of
            `args`.

    Raises:
        DataError: the source cannot be read, has too many bad rows, or no row with both sides; or all
            translations are the source texts themselves.
        ConfigError: an option is wrong, or both sides are one column.
    """
    args = (args or TranslationArgs()).replace(**options)
    table = open_table(Path(source), args, TRANSLATIONS)
    if not table.has_images:
        raise ConfigError(
            f"{source}: `csv_source_key` and `csv_target_key` name one column: name that of the translations"
        )
    read = _Read(table, args)
    read.go_over_rows()
    return read.translations()


class _Read:
    """What has been read of a table so far."""

    def __init__(self, table: Table, args: TranslationArgs) -> None:
        self.table = table
        self.found: dict[str, dict[str, None]] = {}
        self.rows = self.empty = self.nulls = self.repeated = 0
        self.bad = BadRows(table.source, table.unit, strict=args.strict, limit=args.max_bad_rows)
        self.remarks = Remarks(table.unit)

    def go_over_rows(self) -> None:
        """Read all rows."""
        with closing(self.table.rows()) as rows:
            for row in rows:
                self.rows += 1
                if isinstance(row, BadRow):
                    self.bad.add(row)
                else:
                    self._add(row)

    def _add(self, row: Row) -> None:
        if row.remark:
            self.remarks.add(row)
        texts = [text for text in row.texts if text]
        self.nulls += row.nulls
        self.empty += max(len(row.texts), 1) - len(texts) - row.nulls
        if not texts:
            self.bad.add(BadRow(row.number, row.image, "no translation"))
            return
        known = self.found.setdefault(row.image, {})
        before = len(known)
        known.update(dict.fromkeys(texts))
        self.repeated += len(texts) - (len(known) - before)

    def translations(self) -> Translations:
        """Return what was read. Raises DataError where nothing of it can be used."""
        table = self.table
        if not self.found:
            why = f"none of its {self.rows:,} rows has both sides ({self.bad.examples()})"
            raise DataError(f"{table.source}: {why if self.rows else 'has no rows, only a header'}")
        targets = sum(map(len, self.found.values()))
        untranslated = sum(source in texts for source, texts in self.found.items())
        if untranslated == targets:
            raise DataError(
                f"{table.source}: every translation is its source text itself; name the column of "
                "translations with `csv_target_key`"
            )
        report = TranslationReport(
            source=table.source,
            kind=table.kind,
            unit=table.unit,
            rows=self.rows,
            bad_rows=self.bad.count,
            reasons=tuple(self.bad.reasons.most_common()),
            first_bad=tuple(sorted(self.bad.first, key=lambda row: row.number)),
            notes=(*table.notes, *table.met(), *self.remarks.notes()),
            sources=len(self.found),
            targets=targets,
            empty_targets=self.empty,
            null_targets=self.nulls,
            repeated_targets=self.repeated,
            untranslated=untranslated,
        )
        return Translations(tuple(self.found), tuple(map(tuple, self.found.values())), report)


def tell_tokens(
    translations: Translations, count: Callable[[Sequence[str]], Sequence[int]], context_length: int
) -> Translations:
    """Return translations whose report has the tokens of both sides; warn where a language is split up."""
    tokens = translations.count_tokens(count, context_length)
    if tokens.ratio >= MANY_TOKENS:
        log.warning(
            "the tokenizer has no words of the target language, and splits them into bytes or letters: %s; "
            "%s of %s translations are over %d tokens, and cut: use shorter texts, "
            "or use a base whose tokenizer knows the language",
            tokens,
            f"{tokens.long_targets:,}",
            f"{sum(map(len, translations.targets)):,}",
            context_length,
        )
    report = translations.report
    return replace(translations, report=None if report is None else replace(report, tokens=tokens))


def split_translations(
    translations: Translations, share: float | None = None, seed: int = 0
) -> tuple[Translations, Translations]:
    """Hold out a share of the source texts: a training part, and a validation part, in order.

    Without a share it is a tenth, at most 1,000. All translations of a text are in one part.

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: there are fewer than two texts.
    """
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"`val_size` must be between 0 and 1, such as 0.1: got {share}")
    size = len(translations)
    if size < 2:
        raise DataError(f"{size} source text: give two or more, of which one is held out to validate on")
    wanted = min(_MOST_HELD_OUT, round(_HELD_OUT * size)) if share is None else round(share * size)
    held_out = set(random.Random(seed).sample(range(size), min(max(1, wanted), size - 1)))

    def some(chosen: Sequence[int]) -> Translations:
        return Translations(
            tuple(translations.sources[i] for i in chosen), tuple(translations.targets[i] for i in chosen)
        )

    return some([i for i in range(size) if i not in held_out]), some(sorted(held_out))
