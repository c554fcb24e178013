"""`Service`: one model in this process that answers messages, for many threads or coroutines at once.

What a request needs happens beside the computing: its texts and pictures are prepared in small thread pools,
its adapter is read in another, and only rows that are ready go to the `Batcher`. Requests are coroutines of
one event loop in a thread, so that thousands may wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipgraft.adapters.open import load
from clipgraft.engine.encoder import encode_mixed, keep_packed
from clipgraft.errors import ConfigError, ItemError, UnavailableError
from clipgraft.evaluate.classification import pool_prompts
from clipgraft.lora.state import Adapter
from clipgraft.models.clip import Clip, unit_norm
from clipgraft.models.device import queued
from clipgraft.models.lone_tower import lone_tower
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.serve.args import ServiceArgs
from clipgraft.serve.batcher import Batcher, BatchLimits
from clipgraft.serve.computing import Computing, alone
from clipgraft.serve.counters import Counters
from clipgraft.serve.folders import Folders
from clipgraft.serve.messages import (
    AdapterInfo,
    Classified,
    Classify,
    Describe,
    Description,
    Encode,
    Encoded,
    Found,
    Item,
    LoadAdapter,
    Message,
    Picture,
    Rank,
    Ranked,
    Search,
    State,
    Statistics,
    Stats,
    Text,
    Thumbnail,
    UnloadAdapter,
    Vectors,
    With,
    weights_fault,
)
from clipgraft.serve.prepare import Prepared, Preparer, all_of
from clipgraft.serve.registry import AdapterRegistry, Loaded
from clipgraft.serve.sources import find_sources

Answer = TypeVar("Answer")
BATCH_TOKENS = 2048
"""ViT-B-32 on a CPU core gains nothing beyond 1,300 tokens or 1,600 patches at once, only latency."""
_STRONGEST = 100.0
_PART, _PARTS_AT_ONCE = 128, 2
_CLASS_CACHE_BYTES = 64 << 20


class Service:
    """A `Backend` in this process; threads use `ask` and `submit`, coroutines of any loop `answer`.

    Attributes:
        clip: the model. While it is served nobody else may change it.
    """

    def __init__(
        self, clip: Clip, args: ServiceArgs | None = None, computing: Computing | None = None
    ) -> None:
        """Returns when a real text and image were encoded, by default in a thread of its own.

        Raises:
            ClipgraftError: an option names what is not there or does not fit the model.
        """
        args = args or ServiceArgs()
        self.clip = clip.eval()
        keep_packed(clip)
        self._args = args
        self._state: State = "starting"
        self._counters = Counters()
        self._towers = tuple(t for t in TOWERS if lone_tower(clip.model) in (None, t))
        sources = find_sources(args.adapters)
        self._folders = Folders(clip, args.folders)
        self._registry = AdapterRegistry(clip, sources, int(args.adapter_memory_mb * 1e6), self._counters)
        self._preparer = Preparer(clip, max(2, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(4 + (os.cpu_count() or 1), "clipgraft-serve", initializer=alone)
        limits = BatchLimits(
            args.max_batch_tokens or BATCH_TOKENS, args.max_wait_ms / 1e3, args.max_queue_seconds
        )
        self._batcher = Batcher(self._compute, limits, self._counters, computing)
        self._classes = _ClassCache(_CLASS_CACHE_BYTES)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clipgraft-loop", daemon=True)
        self._thread.start()
        self._answers: dict[type[Message[Any]], Callable[[Any, float], Coroutine[Any, Any, Any]]] = {
            Encode: self._encode,
            Classify: self._classify,
            Rank: self._rank,
            Search: self._search,
            Thumbnail: self._thumbnail,
            LoadAdapter: self._load_adapter,
            UnloadAdapter: self._unload_adapter,
            Describe: self._describe,
            Stats: self._stats,
        }
        try:
            self._warm_up()
        except BaseException:
            self._stop()
            raise
        self._state = "ready"

    @classmethod
    def load(
        cls,
        model: str = "emoji",
        pretrained: str | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        args: ServiceArgs | None = None,
    ) -> Service:
        """Serve what `clipgraft.load` loads; raises what that raises."""
        return cls(load(model, pretrained, device=device, precision=precision), args)

    @property
    def state(self) -> State:
        """`starting` until a real text and image were encoded, `failed` once nothing is computed any more."""
        return "failed" if self._batcher.failure else self._state

    def ask(self, message: Message[Answer], timeout: float | None = None) -> Answer:
        """Answer a message and wait for it; raises as `Backend.answer`."""
        return self.submit(message, timeout).result()

    def submit(self, message: Message[Answer], timeout: float | None = None) -> Future[Answer]:
        """Begin to answer a message; cancelling the future withdraws what was not computed yet."""
        if self._state in ("draining", "failed"):
            raise UnavailableError("the model is stopping")
        seconds = self._args.timeout if timeout is None else timeout
        return asyncio.run_coroutine_threadsafe(self._answered(message, seconds), self._loop)

    async def answer(self, message: Message[Answer], *, timeout: float | None = None) -> Answer:
        return await asyncio.wrap_future(self.submit(message, timeout))

    async def close(self) -> None:
        """Finish what was accepted, accept nothing more."""
        await asyncio.to_thread(self.shut_down)

    def shut_down(self) -> None:
        """`close` for threads."""
        if self._state == "draining":
            return
        self._state = "draining"
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._stop()

    async def _finish(self) -> None:
        """Wait for all requests under way."""
        others = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        await asyncio.gather(*others, return_exceptions=True)

    def _stop(self) -> None:
        self._batcher.close()
        self._registry.close()
        self._preparer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def _warm_up(self) -> None:
        """Encode a text and an image as a request does, twice: the first also pays for kernels."""
        content = io.BytesIO()
        Image.new("RGB", (64, 48), "grey").save(content, "PNG")
        items: dict[Tower, Item] = {"text": Text("a photo"), "vision": Picture(content.getvalue())}
        for _ in range(2):
            encoded = self.ask(Encode(tuple(items[tower] for tower in self._towers)), timeout=600)
        self._dim = encoded.vectors.shape[1]

    async def _answered(self, message: Message[Answer], seconds: float) -> Answer:
        answer = self._answers.get(type(message))
        if answer is None:
            raise TypeError(f"{type(message).__name__} is no message that a service answers")
        try:
            given = answer(message, time.monotonic() + seconds)
            return cast(Answer, await asyncio.wait_for(given, seconds))
        except asyncio.TimeoutError as error:
            raise UnavailableError(f"there was no answer within {seconds:g} s") from error

    async def _encode(self, message: Encode, deadline: float) -> Encoded:
        adapter = self._asked(message.using, len(message.items))
        found = await self._features(message.items, adapter, message.using.strength, deadline)
        return Encoded(found.vectors, found.tokens, found.cut)

    def _asked(self, using: With, items: int) -> Awaitable[Loaded | None]:
        """Ask for the adapter that a request names; the request waits for it where it is needed.

        Raises:
            UnknownNameError: none of that name.
            ConfigError: its strength is out of range.
        """
        if not (math.isfinite(using.strength) and abs(using.strength) <= _STRONGEST):
            allowed = f"allowed is {-_STRONGEST:g} to {_STRONGEST:g}; 1 is as trained"
            raise ConfigError(f"`strength`: got {using.strength:g}, {allowed}")
        if using.adapter is None:
            return _now(None)
        return asyncio.wrap_future(self._registry.ask(using.adapter, items))

    async def _features(
        self, items: Sequence[Item], adapter: Awaitable[Loaded | None], strength: float, deadline: float
    ) -> _Features:
        """Unit-norm features of items, in their order.

        Many items go some at a time, so that their pixels do not fill the memory, and requests of few items
        that come later are not kept waiting for all of them.
        """
        if not items:
            raise ConfigError("there is nothing to encode: give one text or image at least")
        for number, item in enumerate(items):
            tower: Tower = "text" if isinstance(item, Text) else "vision"
            if tower not in self._towers:
                raise ItemError(number, f"this model has no {tower} tower")
        asked, gate = asyncio.ensure_future(adapter), asyncio.Semaphore(_PARTS_AT_ONCE)

        async def part(start: int) -> tuple[Vectors, Prepared]:
            async with gate:
                return await self._part(items[start : start + _PART], start, asked, strength, deadline)

        parts = await all_of([part(start) for start in range(0, len(items), _PART)])
        return _Features(
            np.concatenate([vectors for vectors, _ in parts]),
            tuple(count for _, prepared in parts for count in prepared.tokens),
            tuple(n + i * _PART for i, (_, prepared) in enumerate(parts) for n in prepared.cut),
        )

    async def _part(
        self,
        items: Sequence[Item],
        start: int,
        asked: asyncio.Future[Loaded | None],
        strength: float,
        deadline: float,
    ) -> tuple[Vectors, Prepared]:
        """Features of some of a request's items, the first of which is its number `start`."""
        try:
            prepared, loaded = await all_of([self._prepared(items), _shielded(asked)])
            adapter = None if loaded is None else await self._at(loaded, strength)
            parts = await all_of(
                [self._rows(tower, prepared, adapter, deadline, start > 0) for tower in prepared.rows]
            )
        except ItemError as error:
            raise ItemError(start + error.index, error.reason) from error
        vectors = np.empty((len(items), parts[0].shape[1]), np.float32)
        for tower, part in zip(prepared.rows, parts, strict=True):
            vectors[prepared.numbers[tower]] = part
        return vectors, prepared

    async def _prepared(self, items: Sequence[Item]) -> Prepared:
        started = time.perf_counter()
        prepared = await self._preparer.prepare(items)
        self._counters.observe("prepare", time.perf_counter() - started)
        return prepared

    async def _at(self, loaded: Loaded, strength: float) -> Adapter | None:
        return loaded.at(strength) if strength in (0, 1) else await self._in_thread(loaded.at, strength)

    async def _rows(
        self, tower: Tower, prepared: Prepared, adapter: Adapter | None, deadline: float, accepted: bool
    ) -> Vectors:
        own = None if adapter is None or not adapter.touches(tower) else adapter
        submitted = self._batcher.submit(tower, prepared.rows[tower], own, deadline, accepted)
        try:
            return await asyncio.wrap_future(submitted)
        except ItemError as error:
            raise ItemError(prepared.numbers[tower][error.index], error.reason) from error

    def _compute(self, tower: Tower, inputs: Sequence[Tensor], adapters: Sequence[Adapter | None]) -> Vectors:
        """Compute a batch; called by the batcher's thread alone."""
        groups: dict[int, tuple[Adapter | None, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            groups.setdefault(id(adapter), (adapter, []))[1].append(row)
        batch, clip = torch.stack(list(inputs)), self.clip
        # Captions are packed on the CPU, so that those on a GPU would be read back.
        batch = clip.cut_tokens(batch) if tower == "text" else queued(batch, clip.device).to(clip.dtype)
        parts = [(adapter, torch.tensor(rows)) for adapter, rows in groups.values()]
        return cast(Vectors, unit_norm(encode_mixed(clip, tower, batch, parts)).cpu().numpy())

    async def _classify(self, message: Classify, deadline: float) -> Classified:
        using = message.using
        asked = asyncio.ensure_future(self._asked(using, len(message.items)))
        loaded = await _shielded(asked)
        trained = None if loaded is None else loaded.head
        if message.head and trained is None:
            raise ConfigError(f"`head`: {using.adapter or 'the base'} has none; give classes instead")
        if trained is not None and (message.head or (message.head is None and not message.classes)):
            assert loaded is not None
            found = await self._features(message.items, asked, using.strength, deadline)
            with torch.no_grad():
                logits = trained(torch.from_numpy(found.vectors))
            return Classified(loaded.read.classes, logits.softmax(1).numpy(), logits.numpy())
        prototypes, found = await all_of(
            [
                self._class_features(message, loaded, deadline),
                self._features(message.items, asked, using.strength, deadline),
            ]
        )
        scores = found.vectors @ prototypes.T
        temperature = self._temperature(loaded, using.strength)
        logits = torch.from_numpy(scores) * math.exp(temperature["logit_scale"])
        if "logit_bias" in temperature:
            logits = logits + temperature["logit_bias"]
            return Classified(message.classes, logits.sigmoid().numpy(), scores, "sigmoid")
        return Classified(message.classes, logits.softmax(1).numpy(), scores)

    async def _class_features(self, message: Classify, loaded: Loaded | None, deadline: float) -> Vectors:
        """Unit-norm features of the classes that a message names, (C, D)."""
        classes, templates, strength = message.classes, message.templates, message.using.strength
        if not classes:
            raise ConfigError("`classes`: none given, and no head was trained with this adapter; name some")
        wrong = [template for template in templates if "{}" not in template]
        if wrong or not templates:
            raise ConfigError(f"`templates`: write {{}} where the class goes, got {(wrong or ['none'])[0]!r}")
        weights = message.template_weights
        if fault := weights_fault(weights, templates):
            raise ConfigError(fault)
        owner = loaded if loaded is not None and strength and loaded.touches("text") else None
        key = (id(owner), strength if owner else 1.0, classes, templates, weights)
        found = self._classes.get(key)
        if found is None:
            prompts = tuple(Text(t.replace("{}", name)) for name in classes for t in templates)
            told = await self._features(prompts, _now(owner), strength, deadline)
            counts, shares = [len(templates)] * len(classes), torch.tensor(weights * len(classes))
            found = pool_prompts(torch.from_numpy(told.vectors), counts, shares if weights else None).numpy()
            self._classes.put(key, owner, found)
        return found

    def _temperature(self, loaded: Loaded | None, strength: float) -> dict[str, float]:
        """What makes logits of cosines; the adapter moves its logarithm as far as its strength says."""
        base = {name: float(value.detach()) for name, value in self.clip.temperature.items()}
        own = {} if loaded is None else loaded.read.temperature
        return {name: value + strength * (own.get(name, value) - value) for name, value in base.items()}

    async def _rank(self, message: Rank, deadline: float) -> Ranked:
        if not message.documents:
            raise ConfigError("`documents`: there are none to rank; give one at least")
        items = (message.query, *message.documents)
        asked = self._asked(message.using, len(items))
        found = await self._features(items, asked, message.using.strength, deadline)
        scores = found.vectors[1:] @ found.vectors[0]
        order = np.argsort(-scores, kind="stable")[: message.top]
        return Ranked(tuple(order.tolist()), tuple(scores[order].tolist()), found.tokens)

    async def _search(self, message: Search, deadline: float) -> Found:
        name, using = self._folders.named(message.folder), message.using
        if message.text is None and message.picture is None:
            raise ConfigError("nothing to search for: give a text, an image, or both")
        if not 0 <= message.picture_weight <= 1:
            raise ConfigError(f"`picture_weight`: got {message.picture_weight:g}, allowed is 0 to 1")
        if message.k < 1:
            raise ConfigError(f"`k`: got {message.k}, allowed is 1 or more")
        text = () if message.text is None else (Text(message.text),)
        items: tuple[Item, ...] = text if message.picture is None else (*text, message.picture)
        asked = asyncio.ensure_future(self._asked(using, len(items)))
        loaded, tower = await _shielded(asked), self._folders.tower(name)
        digest = None if loaded is None else await self._in_thread(loaded.digest, tower, using.strength)
        fitting = await self._in_thread(self._folders.fitting, name, digest)
        found = await self._features(items, asked, using.strength, deadline)
        weights = [1.0] if len(items) == 1 else [1 - message.picture_weight, message.picture_weight]
        query = unit_norm(torch.from_numpy(np.array([weights], np.float32) @ found.vectors)).numpy()
        return Found(await self._in_thread(fitting.search, query, message.k, message.where), name)

    async def _thumbnail(self, message: Thumbnail, deadline: float) -> bytes:
        return await self._in_thread(self._folders.thumbnail, message.folder, message.row, message.side)

    async def _load_adapter(self, message: LoadAdapter, deadline: float) -> AdapterInfo:
        return await self._in_thread(self._registry.load, message.name, message.source, message.replace)

    async def _unload_adapter(self, message: UnloadAdapter, deadline: float) -> None:
        self._registry.unregister(message.name)

    async def _describe(self, message: Describe, deadline: float) -> Description:
        return await self._in_thread(self._description)

    def _description(self) -> Description:
        clip = self.clip
        return Description(
            base=base_name(clip),
            fingerprint=clip.fingerprint,
            dim=self._dim,
            context_length=clip.context_length,
            device=str(clip.device),
            dtype=str(clip.dtype).removeprefix("torch."),
            adapters=self._registry.infos(),
            folders=self._folders.infos(),
            towers=self._towers,
        )

    async def _stats(self, message: Stats, deadline: float) -> Statistics:
        counts, seconds, rows = self._counters.told()
        gauges = {**self._batcher.gauges, **self._registry.gauges, "rss_bytes": _rss()}
        return Statistics(counts, gauges, seconds, rows)

    async def _in_thread(self, function: Callable[..., Answer], *arguments: object) -> Answer:
        return await self._loop.run_in_executor(self._pool, lambda: function(*arguments))


@dataclass(frozen=True)
class _Features:
    """`Encoded`, within the service."""

    vectors: Vectors
    tokens: tuple[int, ...]
    cut: tuple[int, ...]


class _ClassCache:
    """Features of classes that were asked for lately, within a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held = 0
        # The adapter is kept beside them: its id would be another's otherwise.
        self._found: OrderedDict[Hashable, tuple[Loaded | None, Vectors]] = OrderedDict()

    def get(self, key: Hashable) -> Vectors | None:
        found = self._found.get(key)
        if found is None:
            return None
        self._found.move_to_end(key)
        return found[1]

    def put(self, key: Hashable, owner: Loaded | None, vectors: Vectors) -> None:
        if key in self._found:
            return
        self._found[key] = (owner, vectors)
        self._held += _cost(owner, vectors)
        while self._held > self._budget:
            self._held -= _cost(*self._found.popitem(last=False)[1])


def _cost(owner: Loaded | None, vectors: Vectors) -> int:
    return vectors.nbytes + (0 if owner is None else owner.nbytes)


async def _now(value: Answer) -> Answer:
    return value


async def _shielded(future: asyncio.Future[Answer]) -> Answer:
    """Wait for what others wait for too: giving up does not withdraw it from them."""
    return await asyncio.shield(future)


def base_name(clip: Clip) -> str:
    """What requests call the base by: the last part of its name."""
    name = clip.source.name.rstrip("/") or type(clip.model).__name__
    return name if name.startswith("hf:") and not Path(name.removeprefix("hf:")).exists() else Path(name).stem


def _rss() -> float:
    """Bytes of memory that this process holds; its most so far where the system tells no more."""
    with contextlib.suppress(OSError):
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (
        1 if sys.platform == "darwin" else 1024
    )
