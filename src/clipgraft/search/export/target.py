"""Where vectors go: `parquet:FILE`, `lance:DIR/NAME.lance`, `lancedb:DIR`, `qdrant:…`, `pgvector://…`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from clipgraft.errors import ClipgraftError, ConfigError, DataError
from clipgraft.readers import reason
from clipgraft.search.manifest import COPIES

FORMS = (
    "parquet:FILE, lance:FOLDER/NAME.lance, lancedb:FOLDER, qdrant:FOLDER, qdrant:http://HOST:6333 or "
    "pgvector://USER@HOST/DATABASE, the last four with ?table=NAME"
)
TABLE = "clipgraft"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_IN_SCHEMA = re.compile(rf"({_NAME.pattern}\.)?{_NAME.pattern}")
Kind = Literal["parquet", "lancedb", "qdrant", "pgvector"]


@dataclass(frozen=True)
class Target:
    """A place for the vectors of one set.

    Attributes:
        kind: what reads them.
        place: a file, folder or address, the latter with its password; empty for one beside the vectors.
        table: name of the table or collection; of a file, its own.
        indexed: whether an approximate index is made where the kind can be asked for one.
    """

    kind: Kind
    place: str
    table: str
    indexed: bool = True

    def __str__(self) -> str:
        named = "" if self.kind == "parquet" else f", table {self.table}"
        place = self.hidden(self.place)
        if self.kind == "pgvector":  # as it was given
            place = place.replace("postgresql:", "pgvector:", 1)
        return f"{place}{named}"

    def __repr__(self) -> str:
        return f"Target({self.kind}, {self})"

    def hidden(self, text: str) -> str:
        """Put stars in the place of this address's password, wherever a text has it."""
        for secret in sorted(self._secrets(), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _secrets(self) -> set[str]:
        if "://" not in self.place:
            return set()
        parts = urlsplit(self.place)
        found = {parts.password} | {v for name, v in parse_qsl(parts.query) if name == "password"}
        known = {secret for secret in found if secret}
        return known | {unquote(secret) for secret in known} | {quote(secret) for secret in known}

    def beside(self, folder: Path) -> Target:
        """Fill in the place in the folder of a set, where none was given."""
        if self.place:
            return self
        return replace(self, place=str(folder if self.kind == "lancedb" else folder / COPIES["parquet"]))

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Turn what a library raises into one line without the password; raises DataError."""
        try:
            yield
        except ClipgraftError:
            raise
        except Exception as error:
            told = self.hidden(reason(error))
            fault = f"{self}: cannot {doing} ({told}); check the address, and that you may write there"
            raise DataError(fault) from None if told != reason(error) else error


def parse_target(text: str) -> Target:
    """Read what `to` says; raises ConfigError, which names no password."""
    try:
        urlsplit(text.removeprefix("qdrant:"))
    except ValueError as error:
        raise ConfigError(f"`to`: the address cannot be read ({error}), allowed is {FORMS}") from None
    form, colon, place = text.partition(":")
    if form == "pgvector" and place.startswith("//"):
        return _postgres(text)
    if form in COPIES and not colon:
        return Target("lancedb" if form == "lance" else "parquet", "", Path(COPIES[form]).stem)
    if form == "parquet" and place:
        return Target("parquet", place, Path(place).name)
    if form == "lance" and Path(place).suffix == ".lance":
        return Target("lancedb", str(Path(place).parent), _checked(Path(place).stem))
    if form in ("lancedb", "qdrant") and place:
        place, _, query = place.partition("?")
        return Target("lancedb" if form == "lancedb" else "qdrant", place, _table(query))
    told = text if form in (*COPIES, "lancedb", "qdrant") and "@" not in text else form
    raise ConfigError(f"`to`: got {told!r}, allowed is {FORMS}")


def _table(query: str) -> str:
    """Read `table=NAME`, the one thing that stands behind the question mark."""
    given = dict(parse_qsl(query, keep_blank_values=True))
    table = given.pop("table", TABLE)
    if given:
        raise ConfigError(f"`to`: got ?{next(iter(given))}=, allowed is ?table=NAME")
    return _checked(table)


def _checked(table: str, allowed: re.Pattern[str] = _NAME) -> str:
    if not allowed.fullmatch(table):
        raise ConfigError(
            f"`to`: got table {table!r}, allowed are letters, digits and _, at most 63, and no digit first"
        )
    return table


def _postgres(text: str) -> Target:
    parts = urlsplit(text)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    table, index = given.pop("table", TABLE), given.pop("index", "hnsw")
    if index not in ("hnsw", "none"):
        raise ConfigError(f"`to`: got index={index!r}, allowed is index=hnsw or index=none")
    place = urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(given, quote_via=quote), ""))
    if not parts.netloc:  # a socket, `pgvector:///database?host=/run`: urlunsplit drops empty slashes
        place = f"postgresql://{parts.path}" + (f"?{urlencode(given, quote_via=quote)}" if given else "")
    return Target("pgvector", place, _checked(table, _IN_SCHEMA), index == "hnsw")
