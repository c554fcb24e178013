"""Compare the items of a source with the stored rows, to find what is to be encoded and dropped.

Both lists can be longer than memory, so they are spilled to an SQLite file, which is thrown away afterwards;
64 MiB of it are held. Nothing in it is needed to go on after a kill: it is made anew from the source and the
finished shards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipgraft.search.items import Item
from clipgraft.writing import writing

_CACHE_KIB = 64 << 10
_TABLES = """
CREATE TABLE item(key TEXT PRIMARY KEY, place INT, bytes INT, mtime INT, caption TEXT, reason TEXT,
    offset INT) WITHOUT ROWID;
CREATE TABLE stored(shard INT, row INT, key TEXT, bytes INT, mtime INT, caption TEXT, reason TEXT,
    PRIMARY KEY(shard, row, key)) WITHOUT ROWID;
"""
# Captions of an image that several rows name are joined, each once.
_ADD = """
INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO UPDATE SET caption = CASE
    WHEN excluded.caption IS NULL THEN caption
    WHEN caption IS NULL THEN excluded.caption
    WHEN instr(char(10) || caption || char(10), char(10) || excluded.caption || char(10)) THEN caption
    ELSE caption || char(10) || excluded.caption END
"""
# What listing cannot tell (the size of a file at an address in a table) counts as unchanged.
_SAME = """
stored.key = item.key AND CASE WHEN item.reason IS NULL
    THEN (item.bytes IS NULL OR item.bytes IS stored.bytes)
        AND (item.mtime IS NULL OR item.mtime IS stored.mtime)
    ELSE stored.reason IS NOT NULL AND item.bytes IS stored.bytes AND item.mtime IS stored.mtime END
"""
# A share that is down for a moment must not cost all rows below it.
_STAYS = """
INSERT OR IGNORE INTO item SELECT key, 0, bytes, mtime, caption, reason, NULL FROM stored
WHERE substr(key, 1, length(:inside)) = :inside
"""
_TO_DO = f"FROM item WHERE NOT EXISTS (SELECT 1 FROM stored WHERE {_SAME})"
_COLUMNS = "item.key, item.bytes, item.mtime, item.caption, item.reason, item.offset"
_TOUCHED = f"""
SELECT DISTINCT shard FROM stored LEFT JOIN item ON {_SAME}
WHERE item.key IS NULL OR (stored.row >= 0 AND item.caption IS NOT stored.caption) ORDER BY shard
"""


@dataclass(frozen=True)
class Kept:
    """The part of a shard that stays: rows with their current captions, and unusable items by key."""

    rows: tuple[int, ...]
    captions: tuple[str | None, ...]
    errors: frozenset[str]


@dataclass(frozen=True)
class Counts:
    """Numbers of items in the source, of items to encode, and of stored rows that are gone or changed."""

    items: int
    to_do: int
    gone: int
    stored: int


class Plan:
    """The list of items, the list of stored rows, and their difference. For one thread."""

    def __init__(self, file: Path) -> None:
        """`file` is overwritten."""
        self._file = file
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            self._db = sqlite3.connect(file, isolation_level=None)
            try:
                for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                    self._db.execute(f"PRAGMA {setting}")
                self._db.executescript(_TABLES)
            except BaseException:
                self._db.close()
                raise
        self._order = "item.place, item.key"
        self._unlisted: list[str] = []

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def take(self, items: Iterable[Item], ordered: bool) -> None:
        """Add the items of a source: in its own order if `ordered`, else sorted by key."""
        self._order = "item.place, item.key" if ordered else "item.key"
        with self._at_once():
            self._db.executemany(_ADD, self._values(items, ordered))

    def _values(self, items: Iterable[Item], ordered: bool) -> Iterator[tuple[object, ...]]:
        for place, i in enumerate(items):
            if i.unlisted:
                self._unlisted.append(i.key)
            yield i.key, place if ordered else 0, i.bytes, i.mtime, i.caption, i.reason, i.offset

    def store(self, shard: int, rows: Iterable[tuple[int, Item]]) -> None:
        """Add the rows of a finished shard; row -1 is an item that could not be used."""
        values = ((shard, row, i.key, i.bytes, i.mtime, i.caption, i.reason) for row, i in rows)
        with self._at_once():
            self._db.executemany("INSERT INTO stored VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def compare(self) -> Counts:
        """Count the differences; to be called once, when both lists are complete."""
        with writing(self._file):
            self._db.execute("CREATE INDEX stored_key ON stored(key)")
            for key in self._unlisted:
                for inside in (f"{key}/", f"{key}::"):
                    self._db.execute(_STAYS, {"inside": inside})
        items = self._count("SELECT count(*) FROM item")
        stored = self._count("SELECT count(*) FROM stored WHERE row >= 0")
        kept = self._count(f"SELECT count(*) FROM stored JOIN item ON {_SAME} WHERE row >= 0")
        return Counts(items, self._count(f"SELECT count(*) {_TO_DO}"), stored - kept, stored)

    def overlap(self) -> bool:
        """Tell whether any stored item is in the source, changed or not."""
        return self._count("SELECT EXISTS(SELECT 1 FROM stored JOIN item ON stored.key = item.key)") > 0

    def touched(self) -> list[int]:
        """List the shards that lose a row or get other captions."""
        with writing(self._file):
            return [shard for (shard,) in self._db.execute(_TOUCHED)]

    def kept(self, shard: int) -> Kept:
        """Return the part of a shard that stays."""
        query = (
            f"SELECT stored.row, item.caption, stored.key FROM stored JOIN item ON {_SAME} "
            "WHERE stored.shard = ? ORDER BY stored.row"
        )
        with writing(self._file):
            found = self._db.execute(query, (shard,)).fetchall()
        rows = [(row, caption) for row, caption, _ in found if row >= 0]
        errors = frozenset(key for row, _, key in found if row < 0)
        return Kept(tuple(row for row, _ in rows), tuple(caption for _, caption in rows), errors)

    def to_do(self) -> Iterator[Item]:
        """Yield the items to encode, in order; `touched` must not be called meanwhile."""
        with writing(self._file):
            for row in self._db.execute(f"SELECT {_COLUMNS} {_TO_DO} ORDER BY {self._order}"):
                yield Item(*row)

    def _count(self, query: str) -> int:
        with writing(self._file):
            return int(self._db.execute(query).fetchone()[0])

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """One transaction: without it SQLite writes after every row."""
        with writing(self._file):
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
