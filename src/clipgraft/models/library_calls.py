"""Silence for the libraries that load and save models, and models built without random draws."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger("clipgraft")
_LARGE = 2e9  # bytes that take seconds to read or digest


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own log lines and bars off the terminal while a model loads or is saved.

    Bars of downloads stay, where the output is a terminal; our own lines go through `say`.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    downloads = not are_progress_bars_disabled()
    hf_logging.disable_progress_bar()  # of the hub too
    if downloads:
        enable_progress_bars()
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)


def say(line: str) -> None:
    """Log a line of our own, inside `quiet` too, for what takes seconds."""
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        log.info("%s", line)
    finally:
        logging.disable(disabled)


def say_reading(what: object, size: float) -> None:
    """Say that many bytes are read, which takes seconds; nothing of few."""
    if size >= _LARGE:
        say(f"reading {what} ({size / 1e9:.1f} GB)")


class _NoDraws(TorchFunctionMode):
    """Leaves new weights as they are allocated: they are overwritten, and drawing takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Build models without random weights, and without disturbing the caller's generator."""
    with torch.random.fork_rng(devices=[]), _NoDraws():
        yield
