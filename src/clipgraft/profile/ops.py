"""Formulas for the cost of each operator in a forward pass.

Two numbers: `macs` are the multiply-adds of products, `flops` are 2·macs and all other arithmetic.

Products (`macs`): matrix products and convolutions by closed formulas of their shapes, the same on
every version of torch (its own `FlopCounterMode` knows other operators in each);
attention as its two products, queries × keys and scores × values, in full: a causal mask saves none of them
here, as in `FlopCounterMode`, and kernels that skip hidden blocks do less.

Everything else (`flops` alone): one for each addition, multiplication, division, comparison, exponential,
root or other function of one number, so that an element of

    bias 1 · sum, mean, maximum 1 · norm 2 · variance 4 · softmax 5 (maximum, subtract, exp, sum, divide)
    layer and group norm 5 (mean, subtract, square, sum, scale), RMS norm 3, 1 more for a weight, 1 for a bias
    (so 7 for CLIP's LayerNorm, 4 for an RMSNorm) · batch norm 2, and the same for weight and bias
    sigmoid 4 · SiLU 5 · GELU 5, its tanh form 9 · QuickGELU 6 (as the product and sigmoid that it is)
    attention's scores 6 (scale, softmax), 7 with a mask · pooling 1 for each number read
    resampling bilinear 8, bicubic 32

Moving, copying, looking up (embeddings), casting, choosing and filling cost nothing, nor do integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Price:
    """The cost of one call of an operator.

    Attributes:
        macs: multiply-adds of its products.
        other: operations outside of products.
        backward_macs: multiply-adds of the gradients that its inputs want.
        known: whether a formula covers it; if not, it counts as nothing.
    """

    macs: int = 0
    other: int = 0
    backward_macs: int = 0
    known: bool = True

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add, and the rest."""
        return 2 * self.macs + self.other


_FREE = Price()
_UNKNOWN = Price(known=False)
_MOVES = {
    *("_to_copy", "_unsafe_view", "alias", "as_strided_copy", "bernoulli", "cat", "clone", "col2im"),
    *("constant_pad_nd", "copy", "detach", "diag_embed", "embedding", "expand_copy", "fill", "flip"),
    *("gather", "im2col", "index", "index_copy", "index_put", "index_select", "lift_fresh"),
    *("masked_fill", "masked_scatter", "masked_select", "nonzero", "pixel_shuffle", "pixel_unshuffle"),
    *("reflection_pad2d", "repeat", "repeat_interleave", "replication_pad2d", "roll", "scatter"),
    *("select_scatter", "slice_scatter", "sort", "stack", "topk", "tril", "triu", "unfold_copy"),
    *("upsample_nearest2d", "where", "zero", "_index_put_impl", "_local_scalar_dense", "_assert_async"),
    *("_assert_tensor_metadata", "as_strided", "empty_like", "full_like", "ones_like", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_zeros", "rand_like", "randn_like", "resize", "set"),
}
_PER_OUTPUT = {
    **{"sigmoid": 4, "log_sigmoid_forward": 4, "silu": 5, "softplus": 3, "hardswish": 4, "hardsigmoid": 3},
    **{"mish": 5, "elu": 3, "abs": 1, "lerp": 3, "addcmul": 2, "addcdiv": 2, "native_dropout": 2, "pow": 1},
    **{"_softmax": 5, "_safe_softmax": 5, "_log_softmax": 5},
    **{"upsample_bilinear2d": 8, "_upsample_bilinear2d_aa": 8},
    **{"upsample_bicubic2d": 32, "_upsample_bicubic2d_aa": 32},
}
_PER_INPUT = {
    **{"sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "prod": 1},
    **{"cumsum": 1, "cumprod": 1, "any": 1, "all": 1, "linalg_vector_norm": 2, "norm": 2},
    **{"var": 4, "std": 4, "var_mean": 4, "logsumexp": 3},
    **{"_adaptive_avg_pool2d": 1, "adaptive_max_pool2d": 1},
}
_NORMS = {
    **{"native_layer_norm": 5, "native_group_norm": 5, "_fused_rms_norm": 3, "native_batch_norm": 2},
    **{"_native_batch_norm_legit_no_training": 2, "cudnn_batch_norm": 2},
}
_POOLS = frozenset(("avg_pool2d", "max_pool2d_with_indices"))
_ATTENTION = frozenset(
    (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)
# The arguments of products that are multiplied; `self` is added by those that have a better name for them.
_OPERANDS = ("mat1", "mat2", "batch1", "batch2", "mat", "vec", "tensor", "input", "weight")


@dataclass(frozen=True)
class _Call:
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by the names of the schema."""
        return {**dict(zip(_kind(self.func).arguments, self.args, strict=False)), **self.kwargs}


@dataclass(frozen=True)
class _Kind:
    """An overload: its name, in-place ones under that of the other; whether it only moves numbers."""

    name: str
    moves: bool
    arguments: tuple[str, ...]


def price(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Price:
    """Return the cost of one call of an aten overload, from shapes, types and flags of its tensors alone."""
    kind = _kind(func)
    if kind.moves:
        return _FREE
    call = _Call(func, args, kwargs, out)
    if kind.name in _PRODUCTS:
        return _PRODUCTS[kind.name](call)
    inputs, outputs = _tensors(args), _tensors(out)
    if not inputs or not any(value.is_floating_point() for value in (*inputs, *outputs)):
        return _FREE
    written = outputs[0].numel() if outputs else 0
    other = _elementwise(kind.name, call, inputs[0].numel(), written)
    return _UNKNOWN if other is None else Price(other=other)


@functools.cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    name = str(schema.name).partition("::")[2]
    if name.endswith("_") and not name.endswith("__"):
        name = name.removesuffix("_")
    alias = schema.returns[0].alias_info if schema.returns else None
    moves = name in _MOVES or (alias is not None and not alias.is_write)
    return _Kind(name, moves, tuple(argument.name for argument in schema.arguments))


def _elementwise(name: str, call: _Call, read: int, written: int) -> int | None:
    """Operations of anything but a product; None where there is no formula."""
    if name in _NORMS:
        affine = sum(call.named.get(part) is not None for part in ("weight", "bias"))
        return (_NORMS[name] + affine) * read
    if name == "gelu":
        return written * (9 if call.kwargs.get("approximate") == "tanh" else 5)
    if name in _POOLS:
        return written * int(math.prod(call.named["kernel_size"]))
    # `max(a, b)` goes by element, unlike `max(a)`.
    if name in _PER_INPUT and call.func._schema.overload_name != "other":
        return read * _PER_INPUT[name]
    if name in _PER_OUTPUT:
        return written * _PER_OUTPUT[name]
    return written if torch.Tag.pointwise in call.func.tags else None


def _matrix_product(call: _Call) -> Price:
    first = next(call.named[name] for name in ("mat1", "batch1", "self") if name in call.named)
    return _product(call, call.out.numel() * first.shape[-1])


def _convolution(call: _Call) -> Price:
    """The whole kernel at each place of the output, or of the input where it is transposed."""
    named = call.named
    places = named["input"] if named["transposed"] else call.out
    return _product(call, named["weight"].numel() * len(places) * math.prod(places.shape[2:]))


def _linear(call: _Call) -> Price:
    return _product(call, call.out.numel() * call.named["weight"].shape[-1])


def _matrix_vector(call: _Call) -> Price:
    named = call.named
    return _product(call, int(named.get("mat", named["self"]).numel()))


def _product(call: _Call, macs: int) -> Price:
    """With the bias, and for each operand that wants a gradient as many multiply-adds again."""
    named = call.named
    operands = [named[name] for name in _OPERANDS if name in named]
    adds = len(operands) > 1 and "self" in named
    bias = named["self"] if adds else named.get("bias")
    if len(operands) == 1:
        operands.append(named["self"])
    added = call.out.numel() if bias is not None and named.get("beta", 1) != 0 else 0
    return Price(macs, added, macs * sum(map(_wants_gradient, operands)))


def _attention(call: _Call) -> Price:
    """Softmax(q·kᵀ)·v; its backward pass computes the scores anew, then two products for each of the two."""
    named = call.named
    query, key, value = named["query"], named["key"], named["value"]
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    over_keys, over_values = scores * query.shape[-1], scores * value.shape[-1]
    masks = (named.get("attn_mask"), named.get("attn_bias"), named.get("is_causal") or None)
    masked = any(mask is not None for mask in masks)
    wanted = any(map(_wants_gradient, (query, key, value)))
    backward = 3 * over_keys + 2 * over_values if wanted else 0
    return Price(over_keys + over_values, scores * (7 if masked else 6), backward)


def _fast_path(call: _Call) -> Price:
    """`nn.MultiheadAttention` in one operator, which torch runs where no gradient is wanted."""
    named = call.named
    rows, length, dim = named["query"].shape
    scores = rows * length * named["key"].shape[1]
    weights = named["qkv_weight"].numel() + named["proj_weight"].numel()
    biases = rows * length * (named["qkv_bias"].numel() + named["proj_bias"].numel())
    per_score = 6 if named.get("mask") is None else 7
    return Price(rows * length * weights + 2 * scores * dim, biases + scores * named["num_head"] * per_score)


_PRODUCTS: dict[str, Callable[[_Call], Price]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _matrix_product),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("mv", "addmv", "dot"), _matrix_vector),
    **dict.fromkeys(_ATTENTION, _attention),
    "linear": _linear,
    "_native_multi_head_attention": _fast_path,
}


def _wants_gradient(value: Tensor) -> bool:
    return value.requires_grad and torch.is_grad_enabled()


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, Tensor)]
