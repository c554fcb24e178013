"""Self-attention over rows of nodes, with kernels that suit short sequences.

On CPUs the backward pass of torch's scaled-dot-product attention takes many times the time of the few small
products it stands for, when sequences are as short as captions. Which of the two is faster is measured
(`AttentionKernels`), not assumed.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.engine.packing import Packed
from clipgraft.errors import DataError, WriteError
from clipgraft.files import cache_folder, write_json
from clipgraft.records import read_json

log = logging.getLogger("clipgraft")
_LONGEST_FOR_PRODUCTS = 512
_ROWS, _REPEATS = 16, 3

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q of (B, heads, M, D), k and v of (B, heads, L, D), additive fp32 mask that broadcasts -> like q."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Run torch's scaled-dot-product attention."""
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention as two products around a softmax in fp32, with its backward pass written out."""
    context: Tensor = _Products.apply(q, k, v, mask)
    return context


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scores = _at_least_fp32(q @ k.transpose(-1, -2))
        scores *= 1 / math.sqrt(q.shape[-1])
        if mask is not None:
            scores += mask
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights.to(q.dtype) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_v = weights.to(q.dtype).transpose(-1, -2) @ grad
        grad_weights = _at_least_fp32(grad @ v.transpose(-1, -2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores = (grad_scores * (1 / math.sqrt(q.shape[-1]))).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, None


def look_up(nodes: Tensor, packed: Packed) -> Tensor:
    """(N, C) nodes -> (M, C) cells.

    Gradients of cells that share a node are summed in fp32. Cells that hold no token have none.
    """
    found: Tensor = _LookUp.apply(nodes, packed)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nodes: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return nodes.index_select(0, packed.cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        packed = ctx.packed
        summed = grad.index_select(0, packed.places)
        summed[packed.count :] = 0
        # bf16 would lose most of what the 64th caption adds to the start token's gradient.
        total = _at_least_fp32(summed.index_select(0, packed.shared))
        total.index_add_(0, packed.slots, grad.index_select(0, packed.repeats).to(total.dtype))
        return summed.index_copy_(0, packed.shared, total.to(grad.dtype)), None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, rows: int, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(rows · L, parts · dim) -> `parts` tensors of (rows, heads, L, dim / heads)."""
    return x.view(rows, -1, parts, heads, x.shape[-1] // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(context: Tensor) -> Tensor:
    """(rows, heads, L, D) -> (rows · L, heads · D)."""
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(L, L) of 0 where a token may look, -inf after it."""
    return torch.full((length, length), -math.inf, device=device).triu(1)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, 1, 1, width) of 0 up to each length and -inf from there on."""
    beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, -math.inf)[:, None, None]


KERNELS: dict[str, Attend] = {"products": products, "sdpa": sdpa}


class AttentionKernels:
    """Attention by the kernel that is fastest for a device, type and length.

    Each is measured once on a machine and kept beside the feature cache, so that two runs of one seed
    compute the same bits.

    Attributes:
        choices: those that were made so far, by a readable key.
    """

    def __init__(self, agree: Callable[[str, str], str] | None = None) -> None:
        """`agree(key, name)` gets what was measured here and returns what all machines use."""
        self.choices: dict[str, str] = {}
        self._agree = agree

    def kernel(self, trains: bool) -> Attend:
        """Return the kernel to train with, or to encode with: a backward pass may change which is faster."""
        return partial(self._attend, trains)

    def _attend(self, trains: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return KERNELS[self.choose(q, k, trains)](q, k, v, mask)

    def choose(self, q: Tensor, k: Tensor, trains: bool) -> str:
        """Name the kernel for queries (B, heads, M, D) and keys (B, heads, L, D)."""
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
    """Return the kernel that this machine measured for `key`; measure and store it if it is new."""
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
    """Read stored measurements; an absent or damaged file holds none."""
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

        return min(KERNELS, key=lambda name: best_seconds(run(KERNELS[name])))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def best_seconds(run: Callable[[], object]) -> float:
    """Time a function: the best of a few runs after a first one that is not counted."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
