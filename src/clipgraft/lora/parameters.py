"""Updates of Parameters that no hook reaches: projections that multiply, and weights that are read.

A weight that some module reads (a table that is added, a Linear that is never called) is parametrised by
torch: whoever reads it gets W'. Dropout on the adapter path is not defined there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgraft.lora.layers import AdapterSlot
from clipgraft.models.sites import SiteRef

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class AdaptedProjection(nn.Module):
    """Stands where a raw (in, out) Parameter stood, for models that compute `x @ self.proj`.

    torch hands `tensor @ self` to `__torch_function__`, so that the update acts on `x` itself and dropout
    can be on the adapter path, which no replacement of the weight could do.
    """

    def __init__(self, weight: nn.Parameter, slot: AdapterSlot, position: int) -> None:
        """`position` is the Parameter's place among those of its host."""
        super().__init__()
        self.weight = weight
        self.lora = slot
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out, layer = x @ self.weight, self.lora.current
        return out if layer is None else layer.adapt(out, x, self.weight.T, None)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], cls):
            return args[1](args[0])
        raise NotImplementedError(
            f"LoRA on a raw projection acts in `x @ proj`, but this model calls {func.__name__} on it: "
            "leave proj out of the targets"
        )


def graft_projection(host: nn.Module, name: str, slot: AdapterSlot) -> None:
    """Put an `AdaptedProjection` where the Parameter `name` of `host` is."""
    position = list(host._parameters).index(name)
    weight = host._parameters.pop(name)
    assert weight is not None
    setattr(host, name, AdaptedProjection(weight, slot, position))


def ungraft_projection(host: nn.Module, name: str) -> None:
    """Give `host` its bare Parameter back."""
    adapted = getattr(host, name)
    delattr(host, name)
    host.register_parameter(name, adapted.weight)
    _move_to(host, name, adapted.position)


class AdaptedWeight(nn.Module):
    """Parametrisation of a weight that is read: W', of one site or of several, each with its rows."""

    def __init__(self, position: int) -> None:
        """`position` is the weight's place among the Parameters of its host."""
        super().__init__()
        self.position = position
        self.refs: dict[str, SiteRef] = {}

    def put(self, ref: SiteRef, slot: AdapterSlot) -> None:
        """Add a site of the weight."""
        self.refs[ref.site.role] = ref
        setattr(self, self._name(ref), slot)

    @staticmethod
    def _name(ref: SiteRef) -> str:
        return "lora" if ref.rows is None else f"lora_{ref.site.role}"

    def forward(self, weight: Tensor) -> Tensor:
        adapted = weight
        for ref in self.refs.values():
            layer = getattr(self, self._name(ref)).current
            if layer is None:
                continue
            if ref.rows is None:
                adapted = layer.folded(weight.view(ref.shape)).view(weight.shape)
            else:
                before, after = adapted[: ref.rows.start], adapted[ref.rows.stop :]
                adapted = torch.cat([before, layer.folded(weight[ref.rows]), after])
        return adapted


class AdaptedBias(nn.Module):
    """Parametrisation of the bias beside a weight that is read: b + what the adapter adds to it."""

    def __init__(self, slot: AdapterSlot, position: int) -> None:
        """`position` is the bias's place among the Parameters of its host."""
        super().__init__()
        self.position = position
        # In a tuple, so that the slot is registered at the weight alone.
        self.slots = (slot,)

    def forward(self, bias: Tensor) -> Tensor:
        layer = self.slots[0].current
        if layer is None or layer.lora_bias is None:
            return bias
        return bias + layer.lora_bias.to(bias.dtype)


def graft_read(model: nn.Module, ref: SiteRef, slot: AdapterSlot) -> None:
    """Let whoever reads the weight of a site, or the bias that it has there, read W' and b'."""
    host, name = model.get_submodule(ref.module), ref.parameter
    if not parametrize.is_parametrized(host, name):
        parametrize.register_parametrization(host, name, AdaptedWeight(_position(host, name)))
    adapted = host.parametrizations[name][0]  # type: ignore[index]
    assert isinstance(adapted, AdaptedWeight)
    adapted.put(ref, slot)
    owner, bias = _bias_place(model, ref)
    if bias:
        parametrize.register_parametrization(owner, bias, AdaptedBias(slot, _position(owner, bias)))


def ungraft_read(model: nn.Module, ref: SiteRef) -> None:
    """Give the host of a weight, and of its bias, their bare Parameters back."""
    owner, bias = _bias_place(model, ref)
    if bias:
        _unparametrize(owner, bias)  # the last one first, so that each finds its old position
    host = model.get_submodule(ref.module)
    if parametrize.is_parametrized(host, ref.parameter):
        _unparametrize(host, ref.parameter)


def _bias_place(model: nn.Module, ref: SiteRef) -> tuple[nn.Module, str]:
    """The owner and name of the bias of a weight that is read; "" where it has none."""
    if ref.kind == "table":
        return model, ""
    owner, _, name = (ref.bias or f"{ref.module}.bias").rpartition(".")
    host = model.get_submodule(owner)
    alone = bool(ref.bias) or ref.rows is None
    return host, name if alone and isinstance(getattr(host, name, None), Tensor) else ""


def _position(host: nn.Module, name: str) -> int:
    return list(host._parameters).index(name)


def _unparametrize(host: nn.Module, name: str) -> None:
    """Give `host` its bare Parameter back.

    Deep copies share the class that torch made for the parametrised host, and torch would take the name off
    that class: off a class of the host's own, the copies keep their update.
    """
    position = host.parametrizations[name][0].position  # type: ignore[index, union-attr]
    shared = type(host)
    host.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(host, name, leave_parametrized=False)
    _move_to(host, name, position)


def _move_to(host: nn.Module, name: str, position: int) -> None:
    """Move a Parameter to its old position: optimisers and state dicts depend on the order."""
    items = [item for item in host._parameters.items() if item[0] != name]
    items.insert(position, (name, host._parameters[name]))
    host._parameters.clear()
    host._parameters.update(items)
