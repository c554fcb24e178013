"""Adapt raw Parameters, which no hook reaches: projections that multiply and tables that are added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgraft.lora.layers import AdapterSlot

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


class AdaptedTable(nn.Module):
    """Parametrisation of a raw (rows, dim) position table: W', dropout not defined on positions."""

    def __init__(self, slot: AdapterSlot, position: int) -> None:
        """`position` is the table's place among the Parameters of its host."""
        super().__init__()
        self.lora = slot
        self.position = position

    def forward(self, weight: Tensor) -> Tensor:
        layer = self.lora.current
        return weight if layer is None else layer.folded(weight)


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


def graft_table(host: nn.Module, name: str, slot: AdapterSlot) -> None:
    """Let `host` read W' where it reads the Parameter `name`."""
    position = list(host._parameters).index(name)
    parametrize.register_parametrization(host, name, AdaptedTable(slot, position))


def ungraft_table(host: nn.Module, name: str) -> None:
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
