"""Torch's own counter of multiply-adds, whole on every version of torch that is supported.

`FlopCounterMode` counts only operators of its registry, and nothing for others. Until 2.14 the registry
lacks attention's fused operator on CPU, so that real passes seem to have no attention at all: there, and
only there, closed formulas stand in for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def attention_flops(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """Queries × keys, and scores × values, of tensors with these shapes."""
    rows, heads, length, _width = query
    return 2 * rows * heads * length * key[-2] * (query[-1] + value[-1])


def attention_backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """The scores anew, then two products for each of the two."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[-2] * (3 * width + 2 * value[-1])


_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS: dict[Any, Callable[..., int]] = {_CPU: attention_flops, _CPU_BACKWARD: attention_backward_flops}


def flop_counter() -> FlopCounterMode:
    """A `FlopCounterMode` that knows attention on CPU."""
    unknown = {operator: formula for operator, formula in FORMULAS.items() if operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=unknown)


@contextlib.contextmanager
def slow_path() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from its fused operator, which no counter knows."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def counted(run: Callable[[], object]) -> int:
    """Multiply-adds that torch's own counter sees."""
    with slow_path(), flop_counter() as counter:
        _ = run()
    return int(counter.get_total_flops()) // 2
