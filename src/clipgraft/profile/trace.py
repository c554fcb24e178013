"""Trace a module's forward pass on the meta device: what every module in it does and costs.

A twin of the model on torch's meta device has every shape and type, and no numbers: operators on it work out
shapes alone. Each is put to the account of the module whose forward called it, and each product also to the
weight that it reads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from clipgraft.profile.ops import Price, price

M = TypeVar("M", bound=nn.Module)
_ALONE = threading.Lock()


def on_meta(model: M) -> M:
    """Copy a model to the meta device, in eval mode; nothing is allocated, the model stays as it is.

    Hooks, adapters and which weights train are copied too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _tensors_of(module):
            if id(value) not in memo:
                memo[id(value)] = _twin(value)
    return copy.deepcopy(model, memo).eval()


def inputs_on_meta(value: Any) -> Any:
    """Move the tensors among the arguments of a call, however deeply nested, to the meta device."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value)


@contextlib.contextmanager
def as_kernels_run() -> Iterator[None]:
    """Let attention on the meta device be one kernel, as on CPUs and GPUs, which keeps no scores.

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
    if attn_mask is not None:
        # T5 adds its table of relative positions here. This kernel has no gradient for it, which is a sum.
        attn_mask = attn_mask.detach()
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


Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCost:
    """A module, what it holds and what it costs. What a module holds or costs includes what is inside it,
    except where `own` says that it is of the module alone.

    Attributes:
        path: dotted, "" for the model.
        kind: its class.
        depth: 0 for the model.
        index_in_depth: counts the modules of that depth, from 1 on.
        input_shape, output_shape: of the first tensor in and out at its last call; None if never called.
        parameters: numbers of weights, one that is shared counted once.
        own_parameters: of those that are its own Parameters.
        trainable: of those that want gradients.
        parameter_bytes: of all of them.
        kernel_shape: of convolutions and pooling.
        calls: how often it ran.
        own_macs, macs: multiply-adds of products.
        own_flops, flops: floating-point operations (`clipgraft.profile.ops`).
        backward_macs: multiply-adds of products in the backward pass, where weights want gradients.
        activation_bytes: of what it returned, over all calls.
    """

    path: str
    kind: str
    depth: int
    index_in_depth: int
    input_shape: Shape | None
    output_shape: Shape | None
    parameters: int
    own_parameters: int
    trainable: int
    parameter_bytes: int
    kernel_shape: Shape | None
    calls: int
    own_macs: int
    macs: int
    own_flops: int
    flops: int
    backward_macs: int
    activation_bytes: int

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Product:
    """The products of one module with one weight, or of activations with each other (`weight` is None)."""

    module: str
    weight: str | None
    macs: int
    backward_macs: int


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        layers: every module, each before what is inside it; the first is the model.
        products: where multiply-adds come from.
        weights: names of the weights that were read.
        input_bytes: of the tensors given.
        saved_bytes: what is kept for the backward pass besides weights and inputs.
        unpriced: operators without a formula, which counted as nothing.
    """

    layers: tuple[LayerCost, ...]
    products: tuple[Product, ...]
    weights: tuple[str, ...]
    input_bytes: int
    saved_bytes: int
    unpriced: tuple[str, ...] = ()

    @property
    def total(self) -> LayerCost:
        """The whole model."""
        return self.layers[0]

    @property
    def forward_bytes(self) -> int:
        """What the innermost modules that ran returned."""
        inner = {layer.path.rpartition(".")[0] for layer in self.layers if layer.calls and layer.path}
        above = {prefix for path in inner for prefix in _prefixes(path)}
        return sum(layer.activation_bytes for layer in self.layers if layer.path not in above)

    def layer(self, path: str) -> LayerCost:
        """The module at a path; raises KeyError if there is none."""
        return {layer.path: layer for layer in self.layers}[path]


def trace(model: nn.Module, *args: Any, call: Callable[..., object] | None = None, **kwargs: Any) -> Trace:
    """Trace a forward pass in eval mode, for inputs of any device; neither they nor the model change.

    Args:
        model: any module, with weights or on the meta device.
        args, kwargs: what it is called with; of tensors, only shape and type matter.
        call: what to run instead of the model itself, as `call(model, *args, **kwargs)`.
    """
    twin = on_meta(model)
    ledger = _Ledger({_storage(weight): name for name, weight in twin.named_parameters()})
    inputs = inputs_on_meta((args, kwargs))
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    run = partial(call, twin) if call is not None else twin
    with _watched(twin, ledger), as_kernels_run(), torch.enable_grad(), ledger.saving(), _Operators(ledger):
        _ = run(*inputs[0], **inputs[1])
    return Trace(
        layers=tuple(_layers(twin, ledger)),
        products=tuple(Product(*key, *cost) for key, cost in ledger.products.items()),
        weights=tuple(name for name in ledger.weights.values() if name in ledger.read),
        input_bytes=sum(map(_bytes, given)),
        saved_bytes=ledger.saved_bytes({*ledger.weights, *map(_storage, given)}),
        unpriced=tuple(sorted(ledger.unpriced)),
    )


def join(first: Trace, second: Trace) -> Trace:
    """Two calls of one model, or of two of its methods, as one: what they cost is added up.

    Raises:
        ValueError: they are of two models.
    """
    layers = []
    for one, other in zip(first.layers, second.layers, strict=True):
        if (one.path, one.kind) != (other.path, other.kind):
            raise ValueError(f"the traces are of two models: {one.path} and {other.path} differ")
        last = other if other.calls else one
        sums = {name: getattr(one, name) + getattr(other, name) for name in _SUMS}
        layers.append(replace(last, **sums))
    return Trace(
        layers=tuple(layers),
        products=first.products + second.products,
        weights=tuple(dict.fromkeys(first.weights + second.weights)),
        input_bytes=first.input_bytes + second.input_bytes,
        saved_bytes=first.saved_bytes + second.saved_bytes,
        unpriced=tuple(sorted({*first.unpriced, *second.unpriced})),
    )


_SUMS = ("calls", "own_macs", "macs", "own_flops", "flops", "backward_macs", "activation_bytes")


@dataclass
class _Ledger:
    """What was seen so far.

    Attributes:
        weights: names of the weights by their storage.
        read: names of those that an operator took.
        stack: paths of the modules that are running.
    """

    weights: Mapping[int, str]
    read: set[str] = field(default_factory=set)
    stack: list[str] = field(default_factory=lambda: [""])
    macs: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    products: dict[tuple[str, str | None], tuple[int, int]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, tuple[Shape | None, Shape | None]] = field(default_factory=dict)
    returned: Counter[str] = field(default_factory=Counter)
    saved: list[Tensor] = field(default_factory=list)
    unpriced: set[str] = field(default_factory=set)

    def charge(self, cost: Price, given: list[Tensor]) -> None:
        """Put an operator and the tensors that it took to the account of the module that runs."""
        path = self.stack[-1]
        names = [(tensor, self.weights.get(_storage(tensor))) for tensor in given]
        self.read.update(name for _, name in names if name is not None)
        self.flops[path] += cost.flops
        if cost.macs:
            self.macs[path] += cost.macs
            self.backward[path] += cost.backward_macs
            # Vectors are biases, and weights stand behind activations.
            matrices = [name for tensor, name in reversed(names) if tensor.ndim > 1 and name is not None]
            key = path, matrices[0] if matrices else None
            forward, backward = self.products.get(key, (0, 0))
            self.products[key] = (forward + cost.macs, backward + cost.backward_macs)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Note what autograd keeps."""

        def keep(tensor: Tensor) -> Tensor:
            self.saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def saved_bytes(self, without: set[int]) -> int:
        """Bytes of what autograd keeps, each storage once."""
        sizes = {_storage(t): t.untyped_storage().nbytes() for t in self.saved}
        return sum(size for storage, size in sizes.items() if storage not in without)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = price(func, args, kwargs or {}, out)
        lists = (value if isinstance(value, (list, tuple)) else (value,) for value in args)
        self.ledger.charge(cost, [tensor for part in lists for tensor in part if isinstance(tensor, Tensor)])
        if not cost.known:
            self.ledger.unpriced.add(str(func.overloadpacket))
        return out


@contextlib.contextmanager
def _watched(model: nn.Module, ledger: _Ledger) -> Iterator[None]:
    """Keep `ledger.stack` on the module that runs; a module's own hooks run inside it."""

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        ledger.stack.append(path)
        ledger.calls[path] += 1
        ledger.shapes[path] = (_first_shape((args, kwargs)), None)

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        ledger.stack.pop()
        ledger.shapes[path] = (ledger.shapes[path][0], _first_shape(output))
        ledger.returned[path] += sum(_bytes(t) for t in tree_leaves(output) if isinstance(t, Tensor))

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, path), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leave, path), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module, ledger: _Ledger) -> Iterator[LayerCost]:
    seen_at: Counter[int] = Counter()
    paths = [path for path, _ in model.named_modules()]
    totals = {kind: _with_inner(paths, getattr(ledger, kind)) for kind in ("macs", "flops", "backward")}
    for path, module in model.named_modules():
        depth = path.count(".") + 1 if path else 0
        seen_at[depth] += 1
        weights, own = list(module.parameters()), list(module.parameters(recurse=False))
        first, last = ledger.shapes.get(path, (None, None))
        yield LayerCost(
            path=path,
            kind=type(module).__name__.removeprefix("Parametrized"),
            depth=depth,
            index_in_depth=seen_at[depth],
            input_shape=first,
            output_shape=last,
            parameters=sum(w.numel() for w in weights),
            own_parameters=sum(w.numel() for w in own),
            trainable=sum(w.numel() for w in weights if w.requires_grad),
            parameter_bytes=sum(map(_bytes, weights)),
            kernel_shape=_kernel_shape(module),
            calls=ledger.calls[path],
            own_macs=ledger.macs[path],
            macs=totals["macs"][path],
            own_flops=ledger.flops[path],
            flops=totals["flops"][path],
            backward_macs=totals["backward"][path],
            activation_bytes=ledger.returned[path],
        )


def _kernel_shape(module: nn.Module) -> Shape | None:
    size = getattr(module, "kernel_size", None)
    return size if size is None or isinstance(size, tuple) else (size,)


def _with_inner(paths: list[str], own: Counter[str]) -> Counter[str]:
    """Every module's count with those of the modules inside it."""
    totals: Counter[str] = Counter()
    for path in paths:
        for prefix in _prefixes(path):
            totals[prefix] += own[path]
    return totals


def _prefixes(path: str) -> list[str]:
    """A path and those of all modules around it."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _first_shape(value: Any) -> Shape | None:
    first = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
    return None if first is None else tuple(first.shape)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
