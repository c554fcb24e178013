"""Call transformers and open_clip quietly, and build their models without drawing random weights.

Logging, warnings and progress bars belong to the whole process, and other threads may be loading, training or
logging meanwhile. Log records and warnings are therefore dropped for the calling thread alone. transformers'
bars and torch's random generator have no setting for one thread: a lock guards them here, and the last thread
that leaves restores what the first one found.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger("clipgraft")
_LARGE = 2e9  # bytes that take seconds to read or digest


class _QuietThreads(logging.Filter):
    """Drops what libraries log and warn of in threads that are inside `quiet_libraries`.

    It is a filter of logging handlers, and by `match` the pattern of an `ignore` entry in `warnings.filters`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._here = threading.local()
        self._inside = 0
        self._handlers: list[logging.Handler] = []
        self._added = False
        self._bars = self._download_bars = True

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep clipgraft's own records, critical ones, and those of other threads."""
        ours = record.name.partition(".")[0] == log.name
        return ours or record.levelno >= logging.CRITICAL or not self._is_here()

    def match(self, _: str) -> bool:
        """Whether a warning is to be ignored; `warnings` asks this of the patterns in its filters."""
        return self._is_here()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside with this thread."""
        self._here.depth = getattr(self._here, "depth", 0) + 1
        with self._lock:
            self._inside += 1
            self._listen()
            if self._inside == 1:
                self._hide_bars()
        try:
            yield
        finally:
            self._here.depth -= 1
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore()

    def _is_here(self) -> bool:
        return getattr(self._here, "depth", 0) > 0

    def _listen(self) -> None:
        """Filter every handler there is, those that others have added since included.

        Where the root logger has none, `logging.warning` would add one for good: until the last thread has
        left it has that of last resort, which writes the same records as without.
        """
        if not logging.root.handlers and logging.lastResort is not None:
            logging.root.addHandler(logging.lastResort)
            self._added = True
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        handlers = [h for each in loggers if isinstance(each, logging.Logger) for h in each.handlers]
        for handler in (*handlers, logging.lastResort):
            if handler is not None and self not in handler.filters:
                handler.addFilter(self)
                self._handlers.append(handler)
        entry: Any = ("ignore", self, Warning, None, 0)
        if entry not in warnings.filters:
            warnings.filters.insert(0, entry)  # type: ignore[attr-defined]

    def _hide_bars(self) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils import logging as hf_logging

        self._bars, self._download_bars = (
            hf_logging.is_progress_bar_enabled(),
            not are_progress_bars_disabled(),
        )
        hf_logging.disable_progress_bar()  # huggingface_hub's bars of downloads too, which are wanted
        if self._download_bars:
            enable_progress_bars()

    def _restore(self) -> None:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as hf_logging

        if self._added and logging.lastResort is not None:
            logging.root.removeHandler(logging.lastResort)
        self._added = False
        for handler in self._handlers:
            handler.removeFilter(self)
        self._handlers = []
        entry: Any = ("ignore", self, Warning, None, 0)
        with contextlib.suppress(ValueError):  # gone where others have put older filters back
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        if self._bars:
            hf_logging.enable_progress_bar()
            if not self._download_bars:
                disable_progress_bars()


_QUIET = _QuietThreads()


def quiet_libraries() -> contextlib.AbstractContextManager[None]:
    """Keep the libraries' log lines, warnings and bars off the terminal while a model loads or is saved.

    Bars of downloads and clipgraft's own log lines stay. Other threads go on logging and warning.
    """
    return _QUIET.entered()


def log_reading(what: object, size: float) -> None:
    """Log that a large number of bytes is read, which takes seconds; nothing of a small one."""
    if size >= _LARGE:
        log.info("reading %s (%.1f GB)", what, size / 1e9)


_GENERATOR = threading.RLock()
"""Held while torch's default generator is borrowed, so that two loads do not put each other's state back."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights from `seed`, and put the caller's generator back afterwards."""
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves new weights as they are allocated: they are overwritten, and drawing takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_initialization() -> Iterator[None]:
    """Build modules without initializing their weights, and put the caller's generator back afterwards."""
    with _GENERATOR, torch.random.fork_rng(devices=[]), _NoDraws():
        yield
