"""Base weights in the type that is computed in: frozen ones are prepared once, trained ones at every use."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from clipgraft.engine.products import Frozen, freeze
from clipgraft.models.anatomy import Linear, Part

_Made = TypeVar("_Made", Tensor, Frozen)
_State: TypeAlias = Hashable


class Weights:
    """Looks weights up in one compute type, and keeps what it made of frozen ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[Hashable, tuple[_State, Tensor | Frozen]] = {}

    def frozen(self, linear: Linear) -> Frozen | None:
        """A map with no trained weight, ready to be multiplied by; None if one of its parts trains."""
        sources = [t for part in linear for t in (part.weight, part.bias) if t is not None]
        if any(tensor.requires_grad for tensor in sources):
            return None
        key = tuple(part.site for part in linear)
        return self._keep(key, sources, lambda: freeze(*self.stacked(linear)))

    def stacked(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The (out, in) weight and (out,) bias of a map, its parts stacked by rows; differentiable."""
        weight = _stack(linear, [part.weight for part in linear]).flatten(1).to(self.dtype)
        if linear[0].bias is None:
            return weight, None
        return weight, _stack(linear, [part.bias for part in linear]).to(self.dtype)

    def _keep(self, key: Hashable, sources: list[Tensor], make: Callable[[], _Made]) -> _Made:
        # An optimiser or load_state_dict writes in place, and a move to another device replaces the storage.
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in sources)
        known = self._kept.get(key)
        if known is None or known[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                known = (state, make())
            self._kept[key] = known
        return known[1]  # type: ignore[return-value]


def out_rows(part: Part) -> int:
    """How many outputs a part has."""
    return part.weight.shape[0] if part.rows is None else part.rows.stop - part.rows.start


def _stack(linear: Linear, tensors: list[Tensor | None]) -> Tensor:
    given = [tensor for tensor in tensors if tensor is not None]
    first, last = linear[0].rows, linear[-1].rows
    if first is not None and last is not None:
        return given[0][first.start : last.stop]
    return given[0] if len(given) == 1 else torch.cat(given)
