"""Stream items through an engine into shards, in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from clipgraft.progress import Told
from clipgraft.search.args import EncodeArgs
from clipgraft.search.engines import EncodedBatch, Engine, Modality
from clipgraft.search.items import Item
from clipgraft.search.store import ErrorRow, MetaRow, NewShard, Store

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class _Batch:
    """Items that are encoded together; the last batch of a shard closes it."""

    items: tuple[Item, ...]
    last: bool

    @property
    def usable(self) -> list[Item]:
        return [item for item in self.items if item.reason is None]


@dataclass
class _Growing:
    """A shard before it is written; vectors stay on the model's device until then."""

    rows: list[MetaRow] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: _Batch, encoded: EncodedBatch) -> None:
        reasons, sizes = iter(encoded.reasons), iter(encoded.sizes)
        for item in batch.items:
            reason = next(reasons) if item.reason is None else item.reason
            if reason is not None:
                self.errors.append(ErrorRow(item.key, reason, item.bytes, item.mtime))
                continue
            width, height, size = next(sizes, (None, None, None))
            known = size if item.bytes is None else item.bytes
            self.rows.append(MetaRow(item.key, known, item.mtime, item.caption, width, height))
        for folder, part in encoded.vectors.items():
            self.vectors.setdefault(folder, []).append(part)

    def whole(self) -> NewShard:
        vectors = {folder: torch.cat(parts).cpu().numpy() for folder, parts in self.vectors.items()}
        return NewShard(self.rows, vectors, self.errors)


@dataclass(frozen=True)
class Reading:
    """The items to encode, what their keys are relative to, and how many there are."""

    items: Iterable[Item]
    root: str
    total: int


def stream(
    store: Store,
    reading: Reading,
    engine: Engine,
    modality: Modality,
    args: EncodeArgs,
    told: Told | None,
) -> None:
    """Encode items into new shards of the store."""
    pending: deque[_Batch] = deque()

    def keys() -> Iterator[Any]:
        for batch in _batches(reading.items, args):
            pending.append(batch)
            yield modality.keys(reading.root, batch.usable)

    started, done, shard = time.monotonic(), 0, _Growing()
    kernels: dict[str, str] = {}
    with closing(engine.encode(keys(), _how_many(reading.total, args))) as batches:
        for encoded in batches:
            batch = pending.popleft()
            shard.add(batch, encoded)
            kernels.update(encoded.kernels)
            done += len(batch.items)
            if batch.last:
                store.manifest = replace(store.manifest, kernels=dict(sorted(kernels.items())))
                store.add(shard.whole())
                shard = _Growing()
                _report(store, done, reading.total, time.monotonic() - started)
            if told is not None:
                told(done, reading.total)


def _batches(items: Iterable[Item], args: EncodeArgs) -> Iterator[_Batch]:
    """Cut items into batches that end with their shard, so that batches depend on the shard alone."""
    source = iter(items)
    ahead = list(islice(source, 1))
    while ahead:
        left = args.shard_rows
        while ahead and left:
            count = min(args.batch_size, left)
            batch = (*ahead, *islice(source, count - 1))
            left -= len(batch)
            ahead = list(islice(source, 1))
            yield _Batch(batch, last=not left or not ahead)


def _how_many(items: int, args: EncodeArgs) -> int:
    """Count the batches that `_batches` makes of so many items."""
    shards, rest = divmod(items, args.shard_rows)
    return shards * -(-args.shard_rows // args.batch_size) + -(-rest // args.batch_size)


def _report(store: Store, done: int, total: int, seconds: float) -> None:
    rate = done / seconds if seconds else 0.0
    left = _duration((total - done) / rate) if rate else "?"
    what = store.manifest.origin.kind
    log.info(
        "shard %d: %s of %s %s, %.0f/s, %s left",
        store.manifest.next - 1,
        f"{done:,}",
        f"{total:,}",
        what,
        rate,
        left,
    )


def _duration(seconds: float) -> str:
    """Format seconds as `2 h 5 min`, `4 min 10 s`, `9 s`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
