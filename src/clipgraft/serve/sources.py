"""Where adapters come from: what the words of `ServiceArgs.adapters` name, and what is read there.

A source is the path of an adapter of any format that clipgraft reads, of a run, or `hf:OWNER/NAME`, a
repository of the Hugging Face hub that holds an adapter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipgraft.adapters.builder import AdapterBuilder
from clipgraft.adapters.folder import FILES, is_adapter
from clipgraft.adapters.hub import HUB, fetch_adapter, is_repository
from clipgraft.adapters.run_folder import find_run_model, is_run
from clipgraft.engine.encoder import prepare_adapter
from clipgraft.errors import AdapterError, ClipgraftError, ConfigError
from clipgraft.evaluate.head import Head, load_head
from clipgraft.lora.state import Adapter

log = logging.getLogger("clipgraft")
_NAME = re.compile(r"\w[\w.+-]*")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def check_served_name(name: str) -> str:
    """Refuse names that requests could not write; raises ConfigError."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"adapter name {name!r}: write letters, digits and _.+-, the first a letter or digit"
        )
    return name


def find_sources(words: Iterable[str]) -> dict[str, str]:
    """The sources that words name, by the name that each is served under.

    A word is NAME=SOURCE; or a source, which is served under the name of its folder, file or repository; or a
    folder of adapters and runs, each served under the name of its own folder. No weights are read.

    Raises:
        AdapterError: there is no adapter at a path.
        ConfigError: two are of one name.
    """
    found: dict[str, str] = {}
    for word in words:
        for name, source in _named(word):
            if found.setdefault(check_served_name(name), source) != source:
                raise ConfigError(
                    f"`adapters`: {found[name]} and {source} are both called {name}; write NAME=PATH for one"
                )
    return found


def _named(word: str) -> list[tuple[str, str]]:
    name, equals, source = word.partition("=")
    if equals and not Path(word).exists():
        return [(name.strip(), check_source(source.strip()))]
    if word.startswith(HUB):
        return [(check_source(word).rpartition("/")[2], word)]
    path = Path(word)
    if _is_one(path):
        plain = path.resolve()
        return [(plain.name if path.is_dir() else plain.stem, word)]
    inner = sorted(place for place in path.iterdir() if _is_one(place)) if path.is_dir() else []
    named = [(place.name if place.is_dir() else place.stem, str(place)) for place in inner]
    for unfit in [name for name, _ in named if _NAME.fullmatch(name) is None]:
        log.warning("%s: %s is not served: no request could write that name; rename it", path, unfit)
    named = [(name, source) for name, source in named if _NAME.fullmatch(name)]
    if not named:
        raise AdapterError(f"`adapters` {word}: there is no adapter, run, or folder of them; check the path")
    return named


def check_source(source: str) -> str:
    """Refuse what is certainly no adapter, without reading weights; raises AdapterError."""
    if source.startswith(HUB):
        if not is_repository(source.removeprefix(HUB)):
            raise AdapterError(f"adapter {source}: a repository of the hub is written hf:OWNER/NAME")
    elif not _is_one(Path(source)):
        what = "holds no adapter and is no run" if Path(source).exists() else "is not there"
        raise AdapterError(f"adapter {source}: {what}; give the folder or file of one")
    return source


def _is_one(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in FILES) or is_run(path) or is_adapter(path)
    return path.is_file() and path.suffix in _FILE_SUFFIXES


@dataclass(frozen=True, eq=False)
class Read:
    """What a source holds, ready to compute with.

    Attributes:
        adapter: built for the base, not attached to it.
        temperature: the parts of `Clip.temperature` that it trained, by name.
        head: the classifier that was trained with it, and the names of its classes.
    """

    adapter: Adapter
    temperature: Mapping[str, float]
    head: Head | None = None
    classes: tuple[str, ...] = ()


def read_source(builder: AdapterBuilder, source: str) -> Read:
    """Read an adapter from anywhere and build it for the builder's base, which is not changed.

    Raises:
        AdapterError: it cannot be fetched or read, or was made for another base.
        CheckpointError: its run has saved nothing yet, or its head is damaged.
    """
    path = Path(source) if not source.startswith(HUB) else fetch_adapter(source.removeprefix(HUB))
    found = None if not path.is_dir() or (is_adapter(path) and not is_run(path)) else find_run_model(path)
    adapter, file = builder.read(path)
    for module in adapter.modules():
        module.eval().requires_grad_(False)
    prepare_adapter(builder.clip, adapter)
    folder = None if found is None else found.head
    if folder is None:
        return Read(adapter, file.temperature)
    head, classes = load_head(folder)
    return Read(adapter, file.temperature, head.eval().requires_grad_(False), classes)


def fingerprint_of_files(source: str) -> tuple[object, ...]:
    """What changes when the files of a source do: their sizes and times."""
    if source.startswith(HUB):
        return ()
    path = Path(source)
    places = [path, *(path.iterdir() if path.is_dir() else ()), *path.glob("adapter/*"), *path.glob("head/*")]
    try:
        return tuple(
            sorted((str(place), stat.st_size, stat.st_mtime_ns) for place in places if (stat := place.stat()))
        )
    except OSError:
        return ()


def error_line(error: BaseException) -> str:
    """An error as one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if isinstance(error, ClipgraftError) else f"{type(error).__name__}: {line}"
