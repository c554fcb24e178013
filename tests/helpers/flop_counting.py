"""Count multiply-adds with torch's `FlopCounterMode`, completely on every supported version of torch.

`FlopCounterMode` counts the operators of its registry and takes all others as free. Until torch 2.14 the
registry lacks the fused attention operator of the CPU, so a forward pass seems to have no attention at all.
On those versions, closed formulas are registered for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def attention_flops(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """FLOPs of queries × keys and scores × values, from the shapes of the arguments."""
    rows, heads, length, _width = query
    return 2 * rows * heads * length * key[-2] * (query[-1] + value[-1])


def attention_backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """FLOPs of the backward pass: the scores again, then two products for each of the two products."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[-2] * (3 * width + 2 * value[-1])


_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS: dict[Any, Callable[..., int]] = {_CPU: attention_flops, _CPU_BACKWARD: attention_backward_flops}


def flop_counter() -> FlopCounterMode:
    """Make a `FlopCounterMode` that knows attention on CPU."""
    unknown = {operator: formula for operator, formula in FORMULAS.items() if operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=unknown)


@contextlib.contextmanager
def slow_path() -> Iterator[None]:
    """Switch off the fused operator of `nn.MultiheadAttention`, which no counter knows."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def counted(run: Callable[[], object]) -> int:
    """Count the multiply-adds of a call with torch's own counter."""
    with slow_path(), flop_counter() as counter:
        _ = run()
    return int(counter.get_total_flops()) // 2
