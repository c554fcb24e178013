"""Adapters by name: read when they are first asked for, kept within a budget of memory, shared by all.

Registering reads no weights. The first request for an adapter has it read in a thread of its own, beside
the computing; whoever asks meanwhile waits for the same reading. What is read stays until the budget is
exceeded; then the adapter asked for least often lately goes, the least recently used of several. "Lately"
means that the counts of all are halved each time there were eight requests for each adapter in memory.

A failure is remembered for some seconds or until the files change, so that many requests for a broken
adapter cost one reading. Whoever holds an adapter may go on using it after it was evicted, replaced or
forgotten: the budget counts what the registry keeps, not what is under way.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from clipgraft.adapters.builder import AdapterBuilder
from clipgraft.errors import AdapterError, ClipgraftError, ConfigError, UnknownNameError
from clipgraft.evaluate.head import Head
from clipgraft.lora.state import Adapter
from clipgraft.lora.strength import at_strength
from clipgraft.lora.variants import variant_of
from clipgraft.models.clip import Clip
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.options import nearest
from clipgraft.search.folder import adapter_digest
from clipgraft.serve.computing import alone
from clipgraft.serve.counters import Counters
from clipgraft.serve.messages import AdapterInfo
from clipgraft.serve.sources import (
    Read,
    check_served_name,
    check_source,
    error_line,
    fingerprint_of_files,
    read_source,
)

log = logging.getLogger("clipgraft")
_RETRY_SECONDS = 5.0
_USES_EACH = 8
_MOST_STRENGTHS = 4


class Loaded:
    """An adapter in memory.

    Attributes:
        name: what it is served under.
        read: what its source held.
        nbytes: of its weights and head.
    """

    def __init__(self, clip: Clip, name: str, read: Read) -> None:
        self.name = name
        self.read = read
        self.nbytes = _nbytes(read)
        self._clip = clip
        self._lock = threading.Lock()
        self._strengths: OrderedDict[float, Adapter] = OrderedDict()
        self._digests: dict[tuple[Tower, float], str | None] = {}

    @property
    def head(self) -> Head | None:
        return self.read.head

    def at(self, strength: float) -> Adapter | None:
        """The adapter at a strength; None at 0, which is the base."""
        if strength == 0:
            return None
        if strength == 1:
            return self.read.adapter
        with self._lock:
            found = self._strengths.pop(strength, None)
            if found is None:
                found = at_strength(self._clip, self.read.adapter, strength)
            self._strengths[strength] = found
            if len(self._strengths) > _MOST_STRENGTHS:
                self._strengths.popitem(last=False)
            return found

    def touches(self, tower: Tower) -> bool:
        """Whether it changes what a tower computes."""
        return self.read.adapter.touches(tower)

    def digest(self, tower: Tower, strength: float) -> str | None:
        """`adapter_digest` at a strength."""
        key = (tower, strength)
        if key not in self._digests:
            if len(self._digests) > 2 * _MOST_STRENGTHS:
                self._digests.clear()
            self._digests[key] = adapter_digest(self.at(strength), tower)
        return self._digests[key]


def _nbytes(read: Read) -> int:
    tensors = [*read.adapter.parameters()]
    if read.head is not None:
        tensors += read.head.parameters()
    shared = variant_of(read.adapter.settings).stored_shared(read.adapter.shared, read.adapter.settings)
    products = [t for product in (read.adapter.prepared or {}).values() for t in product.tensors()]
    storages = [tensor.untyped_storage() for tensor in (*tensors, *shared.values(), *products)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(eq=False)
class _Entry:
    """A registered adapter.

    Attributes:
        loaded: in memory, None while it is not.
        reading: under way.
        failure: the last reading's error, with the time and the state of the files it was read from.
        count: requests lately, for eviction; `used` is the number of the last one.
        items: how many it answered.
        known: what `AdapterInfo` says of it, since it was first read.
    """

    name: str
    source: str
    loaded: Loaded | None = None
    reading: Future[Loaded] | None = None
    failure: tuple[ClipgraftError, float, tuple[object, ...]] | None = None
    count: float = 0.0
    used: int = 0
    items: int = 0
    known: AdapterInfo | None = None


@dataclass
class _Memory:
    """What is kept, in bytes, and how often it was asked for since counts were halved."""

    budget: int
    held: int = 0
    uses: int = 0
    clock: int = 0
    entries: list[_Entry] = field(default_factory=list)


class AdapterRegistry:
    """Adapters of one base by name, within a budget of memory; any thread may call it."""

    def __init__(
        self,
        clip: Clip,
        sources: Mapping[str, str] | None = None,
        budget: int = 2 << 30,
        counters: Counters | None = None,
        threads: int = 2,
    ) -> None:
        """`budget` is in bytes; `sources` were checked by `find_sources`."""
        self._clip = clip
        self._builder = AdapterBuilder(clip)
        self._counters = counters or Counters()
        self._lock = threading.RLock()
        self._memory = _Memory(budget)
        self._entries = {name: _Entry(name, source) for name, source in (sources or {}).items()}
        self._pool = ThreadPoolExecutor(threads, "clipgraft-adapters", initializer=alone)

    def register(self, name: str, source: str, replace: bool = False) -> None:
        """Add an adapter by name; nothing but its place is looked at.

        Raises:
            AdapterError: there is no adapter.
            ConfigError: the name cannot be written, or is taken and not to be replaced.
        """
        check_served_name(name)
        check_source(source)
        with self._lock:
            if name in self._entries and not replace:
                raise ConfigError(
                    f"adapter {name} is served already, from {self._entries[name].source}: unload it first, "
                    "or replace it"
                )
            self._put(name, _Entry(name, source))

    def unregister(self, name: str) -> None:
        """Forget an adapter; raises UnknownNameError. What uses it goes on."""
        with self._lock:
            self._find(name)
            self._put(name, None)

    def load(self, name: str, source: str, replace: bool = False) -> AdapterInfo:
        """Register an adapter and read it; if it cannot be read, all is as it was before.

        Raises:
            AdapterError, CheckpointError: it cannot be read.
            ConfigError: as `register`.
        """
        with self._lock:
            before = self._entries.get(name)
            self.register(name, source, replace)
            mine = self._entries[name]
            reading = self._ask(mine)
        try:
            reading.result()
        except ClipgraftError:
            with self._lock:
                if self._entries.get(name) is mine:
                    self._put(name, before)
            raise
        return self._told(mine)

    def ask(self, name: str, items: int = 1) -> Future[Loaded]:
        """The adapter, now or when it is read; the result may raise AdapterError or CheckpointError.

        Do not cancel it: others wait for the same reading.

        Raises:
            UnknownNameError: none of that name, with those of similar names.
        """
        with self._lock:
            entry = self._find(name)
            entry.items += items
            return self._ask(entry)

    def infos(self) -> tuple[AdapterInfo, ...]:
        """Describe all, by name."""
        with self._lock:
            return tuple(self._told(entry) for _, entry in sorted(self._entries.items()))

    @property
    def gauges(self) -> dict[str, float]:
        """How many adapters are in memory, and their bytes."""
        with self._lock:
            return {
                "adapters_loaded": float(len(self._memory.entries)),
                "adapter_bytes": float(self._memory.held),
            }

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _find(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            near = nearest(name, list(self._entries))
            hint = f"did you mean {' or '.join(near)}?" if near else "ask for the list of those that are"
            raise UnknownNameError(f"no adapter {name!r} is served: {hint}")
        return entry

    def _put(self, name: str, entry: _Entry | None) -> None:
        old = self._entries.pop(name, None)
        if old is not None:
            self._drop(old)
        if entry is not None:
            self._entries[name] = entry
            if entry.loaded is not None:
                self._keep(entry, entry.loaded)

    def _ask(self, entry: _Entry) -> Future[Loaded]:
        self._use(entry)
        if entry.loaded is not None:
            self._counters.add("adapter_hits")
            return _done(entry.loaded)
        if entry.reading is not None:
            return entry.reading
        if entry.failure is not None:
            error, when, files = entry.failure
            if time.monotonic() < when + _RETRY_SECONDS and files == fingerprint_of_files(entry.source):
                return _failed(error)
        reading: Future[Loaded] = Future()
        entry.reading = reading
        reading.set_running_or_notify_cancel()
        self._pool.submit(self._read, entry, reading)
        return reading

    def _use(self, entry: _Entry) -> None:
        memory = self._memory
        memory.clock += 1
        memory.uses += 1
        entry.used = memory.clock
        entry.count += 1
        if memory.uses > _USES_EACH * max(1, len(memory.entries)):
            memory.uses = 0
            for each in self._entries.values():
                each.count /= 2

    def _read(self, entry: _Entry, reading: Future[Loaded]) -> None:
        started, files = time.perf_counter(), fingerprint_of_files(entry.source)
        try:
            loaded = Loaded(self._clip, entry.name, read_source(self._builder, entry.source))
        # Whatever a strange file makes libraries raise, it fails the requests for this adapter alone.
        except BaseException as error:
            told = error if isinstance(error, ClipgraftError) else AdapterError(error_line(error))
            log.warning("adapter %s cannot be read: %s", entry.name, told)
            with self._lock:
                entry.reading, entry.failure = None, (told, time.monotonic(), files)
            reading.set_exception(told)
            return
        self._counters.observe("adapter", time.perf_counter() - started)
        self._counters.add("adapter_loads")
        with self._lock:
            entry.reading, entry.failure = None, None
            entry.known = _known(entry, loaded)
            if self._entries.get(entry.name) is entry:
                self._keep(entry, loaded)
        reading.set_result(loaded)

    def _keep(self, entry: _Entry, loaded: Loaded) -> None:
        memory = self._memory
        entry.loaded = loaded
        if entry not in memory.entries:
            memory.entries.append(entry)
            memory.held += loaded.nbytes
        while memory.held > memory.budget:
            others = [each for each in memory.entries if each is not entry]
            self._drop(min(others, key=lambda each: (each.count, each.used)) if others else entry)
            self._counters.add("adapter_evictions")
            if not others:
                log.warning(
                    "adapter %s needs %.1f MB, more than the %.1f MB for all: it is read anew each time; "
                    "raise `adapter_memory_mb`",
                    *(entry.name, loaded.nbytes / 1e6, memory.budget / 1e6),
                )

    def _drop(self, entry: _Entry) -> None:
        if entry in self._memory.entries and entry.loaded is not None:
            self._memory.entries.remove(entry)
            self._memory.held -= entry.loaded.nbytes
            entry.loaded = None

    def _told(self, entry: _Entry) -> AdapterInfo:
        known = entry.known or AdapterInfo(entry.name, entry.source)
        failed = entry.failure is not None
        return AdapterInfo(
            entry.name,
            entry.source,
            "loaded"
            if entry.loaded
            else "loading"
            if entry.reading
            else "failed"
            if failed
            else "registered",
            error_line(entry.failure[0]) if entry.failure is not None else "",
            entry.loaded.nbytes if entry.loaded else 0,
            known.rank,
            known.targets,
            known.towers,
            known.classes,
            entry.items,
        )


def _known(entry: _Entry, loaded: Loaded) -> AdapterInfo:
    adapter = loaded.read.adapter
    return AdapterInfo(
        entry.name,
        entry.source,
        rank=max((layer.r for layer in adapter.layers.values()), default=None),
        targets=adapter.settings.targets,
        towers=tuple(tower for tower in TOWERS if adapter.touches(tower)),
        classes=loaded.read.classes,
    )


def _done(loaded: Loaded) -> Future[Loaded]:
    future: Future[Loaded] = Future()
    future.set_result(loaded)
    return future


def _failed(error: ClipgraftError) -> Future[Loaded]:
    future: Future[Loaded] = Future()
    future.set_exception(copy.copy(error))  # each raising adds to the traceback of its own
    return future
