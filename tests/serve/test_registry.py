"""The registry of adapters: what is read when, what stays in memory, and what a broken adapter costs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipgraft as cg
from clipgraft.adapters.open import Clip
from clipgraft.errors import AdapterError, ConfigError, UnknownNameError
from clipgraft.serve import registry as module
from clipgraft.serve.counters import Counters
from clipgraft.serve.registry import AdapterRegistry
from clipgraft.serve.sources import find_sources
from hub_server import HubServer
from served_adapters import KINDS, write_adapters


@pytest.fixture(scope="module")
def clip() -> Clip:
    return cg.load("emoji")


@pytest.fixture(scope="module")
def folder(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(clip, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def registry(clip: Clip, folder: Path, counters: Counters) -> Iterator[AdapterRegistry]:
    made = AdapterRegistry(clip, find_sources([str(folder)]), counters=counters)
    yield made
    made.close()


def test_words_name_adapters(folder: Path, tmp_path: Path) -> None:
    """A folder of adapters, one adapter, or NAME=PATH is served under another name, or not at all."""
    assert find_sources([str(folder)]) == {name: str(folder / name) for name in sorted(KINDS)}
    assert find_sources([str(folder / "dora")]) == {"dora": str(folder / "dora")}
    assert find_sources([f"x={folder / 'dora'}", "hf:someone/shoes"]) == {
        "x": str(folder / "dora"),
        "shoes": "hf:someone/shoes",
    }
    with pytest.raises(ConfigError, match="are both called dora; write NAME=PATH"):
        find_sources([str(folder), f"dora={folder / 'text'}"])
    for word, told in {
        f"x={tmp_path / 'no'}": "no: is not there",
        str(tmp_path): "there is no adapter, run, or folder of them",
        "hf:someone": "is written hf:OWNER/NAME",
    }.items():
        with pytest.raises(AdapterError, match=told):
            find_sources([word])
    with pytest.raises(ConfigError, match="adapter name 'a/b'"):
        find_sources([f"a/b={folder / 'dora'}"])


def test_a_thousand_are_registered_at_once(clip: Clip, folder: Path, tmp_path: Path) -> None:
    """A server with 1,024 adapters takes minutes to start, because each is read."""
    for number in range(1024):
        (tmp_path / f"a{number}").symlink_to(folder / "text")
    started = time.thread_time()
    registry = AdapterRegistry(clip, find_sources([str(tmp_path)]))
    assert time.thread_time() - started < 1
    assert len(registry.infos()) == 1024
    assert {info.state for info in registry.infos()} == {"registered"}
    registry.close()


def test_many_who_ask_share_one_reading(registry: AdapterRegistry, counters: Counters) -> None:
    """A burst of requests for one adapter reads it once for each of them."""
    found = [registry.ask("both") for _ in range(50)]
    assert len({id(future.result(30)) for future in found}) == 1
    assert counters.told()[0]["adapter_loads"] == 1
    assert registry.ask("both").done()
    assert counters.told()[0]["adapter_hits"] == 1
    info = next(info for info in registry.infos() if info.name == "both")
    assert (info.state, info.rank, info.targets, info.requests) == ("loaded", 3, "attention", 51)
    assert info.towers == ("text", "vision")
    assert registry.gauges == {"adapters_loaded": 1.0, "adapter_bytes": float(info.nbytes)}
    with pytest.raises(UnknownNameError, match="no adapter 'bot' is served: did you mean both"):
        registry.ask("bot")


def test_bytes_are_counted_in_the_type_of_the_base(folder: Path) -> None:
    """A base in bf16 fills the memory with copies of adapters, in the types of both."""
    sizes = {}
    for precision in ("fp32", "bf16"):
        registry = AdapterRegistry(
            cg.load("emoji", precision=precision), find_sources([str(folder / "text")])
        )
        loaded = registry.ask("text").result(30)
        sizes[precision] = loaded.nbytes
        weights = sum(parameter.nbytes for parameter in loaded.read.adapter.parameters())
        registry.close()
    assert sizes == {"fp32": weights, "bf16": weights}


def test_a_broken_adapter_fails_alone(clip: Clip, folder: Path, tmp_path: Path, counters: Counters) -> None:
    """Each request for a broken adapter reads it again, or it stays broken after it was mended."""
    shutil.copytree(folder / "text", tmp_path / "it")
    record = tmp_path / "it" / "clipgraft.json"
    whole = record.read_text(encoding="utf-8")
    other = {**json.loads(whole), "base": {**json.loads(whole)["base"], "fingerprint": "0" * 16}}
    record.write_text(json.dumps(other), encoding="utf-8")
    registry = AdapterRegistry(
        clip, find_sources([str(tmp_path / "it"), str(folder / "dora")]), counters=counters
    )
    for _ in range(3):
        with pytest.raises(AdapterError, match="fingerprint 0000000000000000"):
            registry.ask("it").result(30)
    info = next(info for info in registry.infos() if info.name == "it")
    assert info.state == "failed"
    assert "fingerprint 0000000000000000" in info.error
    assert registry.ask("dora").result(30).nbytes > 0
    record.write_text(whole, encoding="utf-8")
    assert registry.ask("it").result(30).nbytes > 0
    assert counters.told()[0]["adapter_loads"] == 2
    registry.close()


def test_a_failure_is_tried_again_after_a_while(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was away for a moment leaves an adapter broken until the server is started again."""
    read, tries = module.read_source, []

    def flaky(builder: object, source: str) -> object:
        tries.append(source)
        if len(tries) == 1:
            raise OSError("no route to host")
        return read(builder, source)

    monkeypatch.setattr(module, "read_source", flaky)
    for _ in range(2):
        with pytest.raises(AdapterError, match="OSError: no route to host"):
            registry.ask("text").result(30)
    assert len(tries) == 1
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0)
    assert registry.ask("text").result(30).name == "text"


def test_replaced_and_forgotten(registry: AdapterRegistry, folder: Path) -> None:
    """Replacing an adapter by a broken one loses the good one, or what is forgotten still answers."""
    before = registry.ask("text").result(30)
    with pytest.raises(ConfigError, match="is served already"):
        registry.load("text", str(folder / "both"))
    with pytest.raises(AdapterError, match="is not there"):
        registry.load("text", str(folder / "no"), replace=True)
    assert registry.ask("text").result(30) is before
    info = registry.load("text", str(folder / "both"), replace=True)
    assert (info.state, info.rank) == ("loaded", 3)
    assert registry.ask("text").result(30) is not before
    registry.unregister("text")
    with pytest.raises(UnknownNameError):
        registry.ask("text")
    assert registry.gauges["adapter_bytes"] == 0


_HUB = """
import sys
import clipgraft as cg
from clipgraft.errors import AdapterError
from clipgraft.serve.registry import AdapterRegistry
from clipgraft.serve.sources import find_sources
registry = AdapterRegistry(cg.load("emoji"), find_sources(["hf:someone/shoes", "hf:someone/gone"]))
print(registry.ask("shoes").result(60).read.adapter.settings.r)
try:
    registry.ask("gone").result(60)
except AdapterError as error:
    print(error)
"""


def _beside_a_hub(program: str, folder: Path, tmp_path: Path) -> list[str]:
    """Run a program that finds an adapter as `hf:someone/shoes`; gives the lines that it prints."""
    shutil.copytree(folder / "text", tmp_path / "hub" / "someone" / "shoes")
    hub = HubServer(tmp_path / "hub")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    try:
        told = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120, check=True
        )
    finally:
        hub.stop()
    return told.stdout.strip().splitlines()


@pytest.mark.slow
def test_hub_adapters_are_fetched(folder: Path, tmp_path: Path) -> None:
    """`hf:OWNER/NAME` is not found, or its failure ends in a library's traceback."""
    first, second = _beside_a_hub(_HUB, folder, tmp_path)
    assert first == "4"
    assert second.startswith("adapter hf:someone/gone cannot be fetched: ")


_FULL = """
import resource
import clipgraft as cg
from clipgraft.serve.registry import AdapterRegistry
from clipgraft.serve.sources import find_sources
registry = AdapterRegistry(cg.load("emoji"), find_sources(["hf:someone/shoes"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # files may grow no longer
try:
    registry.ask("shoes").result(60)
except cg.errors.AdapterError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
registry.unregister("shoes")
registry.load("shoes", "hf:someone/shoes")
print(registry.ask("shoes").result(60).read.adapter.settings.r)
registry.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are those of POSIX")
def test_a_disk_that_is_full_while_an_adapter_is_fetched(folder: Path, tmp_path: Path) -> None:
    """Half an adapter stays in the cache and is served, or is never fetched again when there is room."""
    first, second = _beside_a_hub(_FULL, folder, tmp_path)
    assert first.startswith("adapter hf:someone/shoes cannot be fetched: ")
    assert second == "4"


class _Sized:
    """Stands for an adapter of so many bytes."""

    def __init__(self, clip: object, name: str, read: int) -> None:
        self.name, self.nbytes, self.read = name, read, self
        self.adapter = type(
            "A", (), {"layers": {}, "settings": cg.LoraConfig(), "touches": lambda *_: False}
        )()
        self.classes = ()


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    budget=st.integers(1, 120),
    asked=st.lists(st.integers(0, 11), max_size=60),
    seed=st.integers(0, 2**16),
)
def test_memory_is_never_above_the_budget(sizes: list[int], budget: int, asked: list[int], seed: int) -> None:
    """A server with many adapters grows until the system kills it, or throws out what it just read."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Loaded", _Sized)
        patch.setattr(module, "read_source", lambda _, source: sizes[int(source)])
        patch.setattr(module, "fingerprint_of_files", lambda _: ())
        patch.setattr(module, "check_source", str)
        counters = Counters()
        registry = AdapterRegistry(None, {f"a{n}": str(n) for n in range(len(sizes))}, budget, counters)  # type: ignore[arg-type]
        gone: set[str] = set()
        for number in asked:
            name = f"a{number % len(sizes)}"
            if rng.random() < 0.05:
                if name in gone:
                    registry.register(name, name[1:])
                else:
                    registry.unregister(name)
                gone ^= {name}
            if name in gone:
                continue
            assert registry.ask(name).result(10).nbytes == sizes[int(name[1:])]
            infos = {info.name: info for info in registry.infos()}
            held = sum(info.nbytes for info in infos.values())
            assert held == registry.gauges["adapter_bytes"] <= budget
            assert (infos[name].state == "loaded") == (sizes[int(name[1:])] <= budget)
        registry.close()


def test_what_is_asked_often_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rarely used adapters throw out the one that most requests want; or an old favourite never leaves."""
    monkeypatch.setattr(module, "Loaded", _Sized)
    monkeypatch.setattr(module, "read_source", lambda *_: 10)
    counters = Counters()
    registry = AdapterRegistry(None, {f"a{n}": str(n) for n in range(64)}, 80, counters)  # type: ignore[arg-type]

    def ask(number: int) -> None:
        registry.ask(f"a{number}").result(10)

    def loaded(name: str) -> bool:
        return next(info for info in registry.infos() if info.name == name).state == "loaded"

    for _ in range(20):
        ask(0)
    for number in range(1, 64):
        ask(number)
    assert loaded("a0")
    for _ in range(20):
        for number in range(8, 16):
            ask(number)
    assert not loaded("a0")
    registry.close()


def test_threads_that_ask_replace_and_forget(clip: Clip, folder: Path) -> None:
    """Two threads at once leave bytes counted that nobody holds."""
    registry = AdapterRegistry(clip, find_sources([str(folder)]), budget=300_000)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(20):
                name = rng.choice(list(KINDS))
                if rng.random() < 0.15:
                    registry.load(name, str(folder / name), replace=True)
                else:
                    assert registry.ask(name).result(30).name == name
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sum(info.nbytes for info in registry.infos()) == registry.gauges["adapter_bytes"] <= 300_000
    registry.close()
