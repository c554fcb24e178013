"""Encode a folder, a table, tar files or texts into vectors on disk, in clip-retrieval's layout.

Held in memory: one shard of vectors and metadata, a few batches of pixels, and 64 MiB of the plan. The plan
is the list of items with what differs from the finished shards, spilled to a file (`plan`).

Whoever runs it again gets the difference: finished shards stay, shards that lost rows are compacted, and new
or changed items go to new shards. After a kill the rest is done, and the folder holds the same bytes as after
an undisturbed run with the same batch and shard size on the same machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.folder import findable
from clipgraft.data.args import TableArgs
from clipgraft.data.feature_key import UnknownError, describe
from clipgraft.data.features import image_steps
from clipgraft.data.loading import Transform
from clipgraft.data.preprocessing import FastPreprocess
from clipgraft.engine.attention import KERNELS, AttentionKernels
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError, together
from clipgraft.files import inside
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.device import use_autocast
from clipgraft.progress import Progress, Told, showing
from clipgraft.results import Result
from clipgraft.search.args import EncodeArgs
from clipgraft.search.engines import EncodedBatch, ImageModality, LocalEngine, Modality, TextModality
from clipgraft.search.folder import adapter_notes, vector_sets
from clipgraft.search.items import Item, ItemSource
from clipgraft.search.manifest import WORK, AdapterNote, Dtype, Manifest, Origin, VectorSet
from clipgraft.search.plan import Counts, Plan
from clipgraft.search.ray_engine import RayEngine, need_ray
from clipgraft.search.recall_gate import passed
from clipgraft.search.sources import open_images, open_texts
from clipgraft.search.store import NewShard, Size, Store, need_pyarrow, open_folder, sole_writer

log = logging.getLogger("clipgraft")
_AUTOCAST = " in bf16 autocast"
_INT8 = " in int8 and bf16"


@dataclass(frozen=True, repr=False)
class EncodeResult(Result):
    """Counts of one run of `encode_folder`.

    Attributes:
        out: the folder.
        encoded: items that were encoded.
        kept: rows that were there and stayed.
        removed: rows that were dropped because their item is gone or has changed.
        errors: items of the source that cannot be used, as `errors.parquet` lists them.
        rows: vectors in each set now.
        sets: folders of vectors below `out`, "" for itself, and the adapter that made each.
        seconds: of the whole run.
    """

    _shows = ("out", "encoded", "kept", "removed", "errors", "rows", "seconds")

    out: Path
    encoded: int
    kept: int
    removed: int
    errors: int
    rows: int
    sets: tuple[VectorSet, ...]
    seconds: float


def encode_folder(
    model: ClipLike,
    source: str | Path,
    out: str | Path,
    args: EncodeArgs | None = None,
    *,
    data: TableArgs | None = None,
    adapters: Sequence[str] | None = None,
    adapter_paths: Mapping[str, str] | None = None,
    progress: Progress = None,
    **options: Any,
) -> EncodeResult:
    """Write unit-norm vectors of all items of a source to a folder, or only what changed since the last run.

    `out` gets `img_emb/img_emb_N.npy` (or `text_emb/…`), `metadata/metadata_N.parquet`, `errors.parquet`
    (path, reason) and `manifest.json`. Numbers may have gaps. No item that cannot be used stops the run.

    Args:
        model: a `Clip` or raw model; the adapter that is active on it acts.
        source: a folder, a table, tar files or an address (`open_images`); with `texts` a text file or table.
        out: a new folder, or one that was written with the same base, adapters and settings.
        args: what to encode, and by what.
        data: how to read a table.
        adapters: names of several adapters that the model carries: each image is decoded once, and every one
            writes to `out/NAME`; those that leave the image tower alone share `out/base`.
        adapter_paths: where adapters were read, so that a search finds them by name.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many), which is called after every batch.
        **options: single fields of `EncodeArgs`, such as `batch_size=32`, in place of those of `args`.

    Raises:
        ConfigError: an option is wrong, int8 loses more recall than it may, Ray is not installed, or there
            is no cluster at the address.
        DataError: the source cannot be listed, another process writes to `out`, or `out` holds other vectors.
        AdapterError: no adapter of such a name, or one is merged.
        ModelError: the model has no preprocessing or tokenizer, cannot be sent to a cluster, or cannot be
            computed in int8.
        ClusterError: the cluster failed; as after a kill, a rerun goes on.
    """
    started = time.monotonic()
    args = (args or EncodeArgs()).replace(**options)
    if faults := args.faults():
        raise together(faults)
    clip, out = as_clip(model), Path(out)
    need_pyarrow()
    if args.engine == "ray":
        need_ray()
    listed = (open_texts if args.texts else open_images)(str(source), data or TableArgs())
    for note in listed.notes:
        log.info("%s: %s", listed.name, note)
    with sole_writer(out):
        before = open_folder(out)
        modality = _modality(clip, args)
        int8 = args.int8
        if args.autocast is None and before is not None:
            int8 |= before.origin.compute.endswith(_INT8)
        autocast = not int8 and _autocast(clip, args.autocast, before)
        origin = _origin(clip, modality, args.dtype, _INT8 if int8 else _AUTOCAST if autocast else "")
        sets = vector_sets(clip, adapters, origin.tower)
        check_same(out, before, origin, sets)
        store = Store(out, before or Manifest(origin, listed.name, listed.root, sets))
        paths = adapter_paths or {}
        notes = adapter_notes(clip, list(paths) if adapters is None else adapters, paths)
        encoder = Encoder(clip, autocast, _attention(store.manifest), int8=int8)
        if int8:
            recall = passed(encoder, store.manifest, args, adapters is not None)
            store.manifest = replace(store.manifest, recall=recall)
        local = LocalEngine(encoder, modality, store.manifest.sets, adapters is not None, args.dtype)
        engine = RayEngine(local, args) if args.engine == "ray" else local
        with showing(progress, modality.kind, modality.kind[:-1]) as told:
            counts = _Run(store, listed, notes, engine, modality, args, told).bring_up_to_date()
    return EncodeResult(
        out,
        encoded=counts.to_do,
        kept=counts.stored - counts.gone,
        removed=counts.gone,
        errors=store.manifest.errors,
        rows=store.manifest.rows,
        sets=store.manifest.sets,
        seconds=time.monotonic() - started,
    )


def _modality(clip: Clip, args: EncodeArgs) -> Modality:
    if args.texts:
        return TextModality(clip)
    return ImageModality(image_steps(clip, None, args.exact_preprocess), args.workers)


@dataclass(frozen=True)
class _Run:
    """One run of `encode_folder`, with everything it needs."""

    store: Store
    source: ItemSource
    notes: tuple[AdapterNote, ...]
    engine: LocalEngine | RayEngine
    modality: Modality
    args: EncodeArgs
    told: Told | None

    def bring_up_to_date(self) -> Counts:
        """Drop rows whose items are gone, encode new items, and count both."""
        store, work = self.store, inside(self.store.folder, WORK)
        spilled = work / "plan.sqlite"
        plan = Plan(spilled)
        try:
            store.drop_damaged()
            counts = self._compare(plan)
            self._check_source(counts, plan)
            known = {note.name: note for note in (*store.manifest.adapters, *self.notes)}
            store.manifest = replace(
                store.manifest,
                source=self.source.name,
                root=self.source.root,
                adapters=tuple(known.values()),
            )
            store.begin()
            self._compact(plan)
            log.info("%s", _summary(counts, store))
            _stream(self, plan, counts.to_do)
            store.finish()
        finally:
            plan.close()
            with contextlib.suppress(OSError):  # all that is ours in it; what else is there stays
                spilled.unlink()
                work.rmdir()
        return counts

    def _compare(self, plan: Plan) -> Counts:
        log.info("listing %s", self.source.name)
        plan.take(self.source.items(), self.source.ordered)
        for note in self.source.met():
            log.info("%s: %s", self.source.name, note)
        for shard in self.store.manifest.shards:
            plan.store(shard.number, self.store.stored(shard, errors=not self.args.retry_errors))
        return plan.compare()

    def _check_source(self, counts: Counts, plan: Plan) -> None:
        """Refuse an empty source, and one unlike that before: an unmounted folder would drop all rows."""
        before, name = self.store.manifest, self.source.name
        what = before.origin.kind
        if not counts.items:
            raise DataError(f"{name}: holds no {what}; name a folder, table or tar files that do")
        if counts.stored and self.source.root != before.root and not plan.overlap():
            raise DataError(
                f"{self.store.folder}: holds vectors of {before.source}, and none of its {what} "
                f"is in {name}; name another folder to write to"
            )

    def _compact(self, plan: Plan) -> None:
        """Remove rows whose items are gone from their shards."""
        touched = set(plan.touched())
        for shard in self.store.manifest.shards:
            if shard.number in touched or (self.args.retry_errors and shard.errors):
                self.store.compact(shard, plan.kept(shard.number))


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

    rows: list[Item] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    errors: list[Item] = field(default_factory=list)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: _Batch, encoded: EncodedBatch) -> None:
        reasons, sizes = iter(encoded.reasons), iter(encoded.sizes)
        for item in batch.items:
            reason = next(reasons) if item.reason is None else item.reason
            if reason is not None:
                self.errors.append(replace(item, reason=reason))
                continue
            width, height, size = next(sizes, (None, None, None))
            self.rows.append(replace(item, bytes=size) if item.bytes is None else item)
            self.sizes.append((width, height))
        for folder, part in encoded.vectors.items():
            self.vectors.setdefault(folder, []).append(part)

    def whole(self) -> NewShard:
        vectors = {folder: torch.cat(parts).cpu().numpy() for folder, parts in self.vectors.items()}
        return NewShard(self.rows, self.sizes, vectors, self.errors)


def _stream(run: _Run, plan: Plan, total: int) -> None:
    """Encode the items of a plan into new shards, in order."""
    pending: deque[_Batch] = deque()
    store = run.store

    def keys() -> Iterator[Any]:
        for batch in _batches(plan.to_do(), run.args):
            pending.append(batch)
            yield run.modality.keys(run.source.root, batch.usable)

    started, done, shard = time.monotonic(), 0, _Growing()
    kernels: dict[str, str] = {}
    with closing(run.engine.encode(keys(), _how_many(total, run.args))) as batches:
        for encoded in batches:
            batch = pending.popleft()
            shard.add(batch, encoded)
            kernels.update(encoded.kernels)
            done += len(batch.items)
            if batch.last:
                store.manifest = replace(store.manifest, kernels=dict(sorted(kernels.items())))
                store.add(shard.whole())
                shard = _Growing()
                _report(store, done, total, time.monotonic() - started)
            if run.told is not None:
                run.told(done, total)


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


def _summary(counts: Counts, store: Store) -> str:
    known = counts.stored - counts.gone
    parts = [
        f"{counts.items:,} {store.manifest.origin.kind}",
        f"{known:,} known",
        f"{counts.to_do:,} to encode",
    ]
    if counts.gone:
        parts.append(f"{counts.gone:,} dropped: gone or changed")
    return ", ".join(parts)


def _autocast(clip: Clip, choice: bool | None, before: Manifest | None) -> bool:
    """Choose bf16 or not: as the user asked, as in the runs before, or as measured."""
    if choice is None and before is not None:
        return before.origin.compute.endswith(_AUTOCAST)
    return use_autocast(choice, clip.device)


def _origin(clip: Clip, modality: Modality, dtype: Dtype, lossy: str) -> Origin:
    source = findable(clip)
    compute = str(clip.dtype).removeprefix("torch.") + lossy
    return Origin(
        modality.kind,
        source.name,
        source.pretrained,
        clip.fingerprint,
        _digest(modality.steps),
        compute,
        dtype,
    )


def _digest(steps: Transform | None) -> str:
    """Return 16 hex digits that identify a preprocessing; empty for texts, and where that is impossible."""
    if steps is None:
        return ""
    try:
        # Its settings alone, which mean the same in the next Python.
        text = repr(steps) if isinstance(steps, FastPreprocess) else describe(steps)
    except UnknownError as reason:
        log.info("a rerun cannot tell whether the preprocessing is the same: it holds %s", reason)
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(out: Path, before: Manifest | None, origin: Origin, sets: Sequence[VectorSet]) -> None:
    """Raise DataError where a folder holds vectors that were made in another way."""
    if before is None:
        return
    was = before.origin
    folders = [{(part.folder, part.digest) for part in parts} for parts in (before.sets, sets)]
    differences = [
        (was.kind != origin.kind, f"holds {was.kind}, not {origin.kind}"),
        (was.fingerprint != origin.fingerprint, f"was made by base {was.base}, not by {origin.base}"),
        (folders[0] != folders[1], f"holds vectors of {_named(before.sets)}, not of {_named(sets)}"),
        (was.dtype != origin.dtype, f"holds {was.dtype}, not {origin.dtype}"),
        (was.compute != origin.compute, f"was computed in {was.compute}, not in {origin.compute}"),
        (was.preprocessing != origin.preprocessing, "was made with another preprocessing"),
    ]
    for differs, fault in differences:
        if differs:
            raise DataError(f"{out}: {fault}; give what it was made with, or name another folder to write to")


def _named(sets: Sequence[VectorSet]) -> str:
    names = [f"adapter {part.adapter} ({part.digest})" if part.digest else "the base" for part in sets]
    where = "" if all(part.folder == "" for part in sets) else ", in a folder each"
    return " and ".join(names) + where


def _attention(manifest: Manifest) -> AttentionKernels:
    """Use the attention kernels that computed the finished shards: others round differently."""
    attention = AttentionKernels()
    attention.choices.update({key: name for key, name in manifest.kernels.items() if name in KERNELS})
    return attention
