"""Models without weights: a twin on torch's meta device has every shape and type, and no numbers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

M = TypeVar("M", bound=nn.Module)
_ALONE = threading.Lock()


def on_meta(model: M) -> M:
    """A copy of a model on the meta device, in eval mode; nothing is allocated, the model stays as it is.

    Hooks, adapters and which weights train are copied too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _tensors_of(module):
            if id(value) not in memo:
                memo[id(value)] = _twin(value)
    return copy.deepcopy(model, memo).eval()


def inputs_on_meta(value: Any) -> Any:
    """Arguments of a call with their tensors, however deep they lie, on the meta device."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value)


@contextlib.contextmanager
def as_kernels_run() -> Iterator[None]:
    """Attention on the meta device is one kernel, as on CPUs and GPUs, and does not write out its scores.

    `nn.MultiheadAttention` takes its slow path, as it does in training: its fast one is a single operator.
    Both are settings of the whole process, which is why one thread at a time is in here; what other threads
    compute keeps its results.
    """
    with _ALONE:
        original, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

        def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            plain = query.is_meta and query.ndim == 4
            result: Tensor = _fused(query, *args, **kwargs) if plain else original(query, *args, **kwargs)
            return result

        # A TorchFunctionMode would not see the call inside F.multi_head_attention_forward.
        F.scaled_dot_product_attention = attention
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original
            torch.backends.mha.set_fastpath_enabled(fast)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    assert isinstance(out, Tensor)
    return out


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and other tensors: rotary tables of some models, the base of merged ones."""
    for value in (module._parameters, module._buffers, *vars(module).values()):
        yield from _tensors_in(value)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, field.name))


def _twin(value: Tensor) -> Tensor:
    twin = torch.empty_like(value.detach(), device="meta")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(twin, requires_grad=value.requires_grad)
    return twin
