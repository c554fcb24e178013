"""Which attention kernel is the faster one, measured where it is going to run."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.engine.attention import Attend, products, sdpa
from clipgraft.errors import DataError, WriteError
from clipgraft.files import cache_folder, write_json
from clipgraft.records import read_json

log = logging.getLogger("clipgraft")
KERNELS: dict[str, Attend] = {"products": products, "sdpa": sdpa}
_LONGEST_FOR_PRODUCTS = 512
_ROWS, _REPEATS = 16, 3


class Attention:
    """Attention by the kernel that is fastest for a device, type and length.

    Each is measured once on a machine and kept beside the feature cache, so that two runs of one seed
    compute the same bits.

    Attributes:
        choices: those that were made so far, by a readable key.
    """

    def __init__(self, agree: Callable[[str, str], str] | None = None) -> None:
        """`agree(key, name)` is told what was measured here, and says what to use, among several machines."""
        self.choices: dict[str, str] = {}
        self._agree = agree

    def kernel(self, trains: bool) -> Attend:
        """The kernel to train with, or to encode with: a backward pass turns the order round."""
        return partial(self._attend, trains)

    def _attend(self, trains: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return KERNELS[self.choose(q, k, trains)](q, k, v, mask)

    def choose(self, q: Tensor, k: Tensor, trains: bool) -> str:
        """Name of the kernel for queries (B, heads, M, D) and keys (B, heads, L, D)."""
        heads, length, dim = k.shape[1:]
        # Products keep all weights of a sequence in memory; GPUs have kernels for what is left.
        if length > _LONGEST_FOR_PRODUCTS or q.device.type != "cpu":
            return "sdpa"
        queries = "one" if q.shape[2] == 1 < length else "all"
        bucket = max(8, 1 << (length - 1).bit_length())
        use = "train" if trains else "encode"
        key = f"{str(q.dtype).removeprefix('torch.')} {heads}x{dim} {queries} {bucket} {use}"
        if key not in self.choices:
            measure = partial(
                _fastest, q.dtype, heads, 1 if queries == "one" else bucket, bucket, dim, trains
            )
            choice = _known_here(key, measure)
            self.choices[key] = choice if self._agree is None else self._agree(key, choice)
        return self.choices[key]


def _known_here(key: str, measure: Callable[[], str]) -> str:
    """What this machine measured for `key` before, or measures now; kept in a file of all its answers."""
    setting = f"{platform.node()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    path = cache_folder() / "kernels.json"
    known = _read(path)
    choice = known.get(setting, {}).get(key)
    if choice in KERNELS:
        return choice
    choice = measure()
    known.setdefault(setting, {})[key] = choice
    try:
        write_json(path, known)
    except WriteError as error:
        log.debug("attention kernels are measured again in every process: %s", error)
    return choice


def _read(path: Path) -> dict[str, dict[str, str]]:
    """An absent or damaged file is measured anew."""
    try:
        return read_json(path, dict[str, dict[str, str]]) if path.is_file() else {}
    except DataError:
        return {}


def _fastest(dtype: torch.dtype, heads: int, queries: int, length: int, dim: int, trains: bool) -> str:
    same = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)  # not those of a checkpointed block
    with torch.inference_mode(False), torch.set_grad_enabled(trains), torch.random.fork_rng(devices=[]), same:
        q = torch.randn(_ROWS, heads, queries, dim).to(dtype).requires_grad_(trains)
        k = torch.randn(_ROWS, heads, length, dim).to(dtype).requires_grad_(trains)
        mask = torch.zeros(queries, length)

        def run(kernel: Attend) -> Callable[[], object]:
            if trains:
                return lambda: kernel(q, k, k, mask).sum().backward()  # type: ignore[no-untyped-call]
            return lambda: kernel(q, k, k, mask)

        return min(KERNELS, key=lambda name: _seconds(run(KERNELS[name])))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _seconds(run: Callable[[], object]) -> float:
    """The best of a few runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
