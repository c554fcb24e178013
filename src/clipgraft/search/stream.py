"""Items through the decoder and the model into shards, in order, the next batches decoded meanwhile."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.features import evaluating
from clipgraft.data.loading import Transform, made_ahead
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.switch import set_adapter
from clipgraft.models.clip import Clip
from clipgraft.search.decoding import Decoded, Decoder
from clipgraft.search.items import Item, ref
from clipgraft.search.manifest import VectorSet
from clipgraft.search.sets import adapters_as_they_were
from clipgraft.search.store import Rows, Store
from clipgraft.search.tables import ErrorRow, MetaRow

log = logging.getLogger("clipgraft")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Maker:
    """What makes the model's inputs of items, and features of those.

    Attributes:
        key: what of a batch of items goes to the workers.
        make: makes inputs of that, there.
        finish: those inputs to what the model takes, here.
        features: that to features.
        workers: processes; 0 is a thread.
        steps: the preprocessing, None for texts.
    """

    key: Callable[[str, Sequence[Item]], Any]
    make: Callable[[Any], Decoded]
    finish: Callable[[Encoder, Tensor], Tensor]
    features: Callable[[Encoder, Tensor], Tensor]
    workers: int
    steps: Transform | None = None


def image_maker(steps: Transform, workers: int) -> Maker:
    """For images: decoded by processes, finished on the model's device."""
    decoder = Decoder(steps)

    return Maker(
        key=lambda root, items: [ref(root, item) for item in items],
        make=decoder,
        finish=lambda encoder, inputs: decoder.finish(inputs.to(encoder.clip.device)),
        features=lambda encoder, pixels: encoder.encode_image(pixels),
        workers=workers,
        steps=steps,
    )


def text_maker(clip: Clip) -> Maker:
    """For texts: tokenized by a thread."""

    def make(texts: list[str]) -> Decoded:
        tokens = clip.tokenize(texts) if texts else None
        return Decoded(tokens, [], [None] * len(texts))

    return Maker(
        key=lambda _, items: [item.key for item in items],
        make=make,
        finish=lambda _, tokens: tokens,
        features=lambda encoder, tokens: encoder.encode_text(tokens),
        workers=0,
    )


@dataclass(frozen=True)
class _Batch:
    """Items that go through together; the last of a shard closes it."""

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

    def add(self, batch: _Batch, decoded: Decoded, vectors: dict[str, Tensor]) -> None:
        reasons, sizes = iter(decoded.reasons), iter(decoded.sizes)
        for item in batch.items:
            reason = next(reasons) if item.reason is None else item.reason
            if reason is not None:
                self.errors.append(ErrorRow(item.key, reason, item.bytes, item.mtime))
                continue
            width, height, size = next(sizes, (None, None, None))
            known = size if item.bytes is None else item.bytes
            self.rows.append(MetaRow(item.key, known, item.mtime, item.caption, width, height))
        for folder, part in vectors.items():
            self.vectors.setdefault(folder, []).append(part)

    def whole(self) -> Rows:
        vectors = {folder: torch.cat(parts).cpu().numpy() for folder, parts in self.vectors.items()}
        return Rows(self.rows, vectors, self.errors)


@dataclass(frozen=True)
class Sizes:
    """How many items meet in a batch, and how many in a shard."""

    batch: int
    shard: int


@dataclass(frozen=True)
class Reading:
    """The items to encode, what their keys are relative to, and how many there are."""

    items: Iterable[Item]
    root: str
    total: int


def stream(
    store: Store,
    reading: Reading,
    encoder: Encoder,
    maker: Maker,
    sizes: Sizes,
    switch: bool,
    progress: Progress | None,
) -> None:
    """Encode items into new shards of the store. `switch` chooses the adapter of each set in turn."""
    pending: deque[_Batch] = deque()

    def keys() -> Iterator[Any]:
        for batch in _batches(reading.items, sizes):
            pending.append(batch)
            yield maker.key(reading.root, batch.usable)

    dtype = getattr(torch, store.manifest.made.dtype)
    started, done, shard = time.monotonic(), 0, _Growing()
    inputs = made_ahead(maker.make, keys(), maker.workers)
    with evaluating(encoder.clip), adapters_as_they_were(encoder.clip), closing(inputs):
        for decoded in inputs:
            batch = pending.popleft()
            vectors = _vectors(encoder, maker, decoded, store.manifest.sets, switch, dtype)
            shard.add(batch, decoded, vectors)
            done += len(batch.items)
            if batch.last:
                kernels = dict(sorted(encoder.attention.choices.items()))
                store.manifest = replace(store.manifest, kernels=kernels)
                store.add(shard.whole())
                shard = _Growing()
                _report(store, done, reading.total, time.monotonic() - started)
            if progress is not None:
                progress(done, reading.total)


def _vectors(
    encoder: Encoder,
    maker: Maker,
    decoded: Decoded,
    sets: Sequence[VectorSet],
    switch: bool,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Unit-norm features of a batch by the set's folder."""
    if decoded.inputs is None:
        return {}
    vectors = {}
    with torch.inference_mode():
        inputs = maker.finish(encoder, decoded.inputs)
    for part in sets:
        if switch:
            set_adapter(encoder.clip, part.adapter)
        with torch.inference_mode():
            features = maker.features(encoder, inputs)
            vectors[part.folder] = F.normalize(features.float(), dim=-1).to(dtype)
    return vectors


def _batches(items: Iterable[Item], sizes: Sizes) -> Iterator[_Batch]:
    """Shards of items, cut into batches: who meets in a batch depends on the shard alone."""
    source = iter(items)
    ahead = list(islice(source, 1))
    while ahead:
        left = sizes.shard
        while ahead and left:
            count = min(sizes.batch, left)
            batch = (*ahead, *islice(source, count - 1))
            left -= len(batch)
            ahead = list(islice(source, 1))
            yield _Batch(batch, last=not left or not ahead)


def _report(store: Store, done: int, total: int, seconds: float) -> None:
    rate = done / seconds if seconds else 0.0
    left = _duration((total - done) / rate) if rate else "?"
    what = store.manifest.made.kind
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
    """`2 h 5 min`, `4 min 10 s`, `9 s`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
