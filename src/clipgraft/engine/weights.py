"""Base weights in the type that is computed in: frozen ones are prepared once, trained ones at every use."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from clipgraft.engine.products import Frozen
from clipgraft.models.anatomy import Linear, Part
from clipgraft.models.sites import Site, Tower


class Weights:
    """Looks weights up in one compute type, and keeps what it made of frozen ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[tuple[Site, ...], tuple[Hashable, Frozen]] = {}

    def frozen(self, linear: Linear) -> Frozen | None:
        """A map without gradients, ready to be multiplied by; None if one of its parts is to get one."""
        sources = [t for part in linear for t in (part.weight, part.bias) if t is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
            return None
        # An optimiser or load_state_dict writes in place, and a move to another device replaces the storage.
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in sources)
        key = tuple(part.site for part in linear)
        known = self._kept.get(key)
        if known is None or known[0] != state:
            known = (state, self._prepare(linear))
            self._kept[key] = known
        return known[1]

    def stacked(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """The (out, in) weight and (out,) bias of a map, its parts stacked by rows; differentiable."""
        weight = _stack(linear, [part.weight for part in linear]).flatten(1).to(self.dtype)
        if linear[0].bias is None:
            return weight, None
        return weight, _stack(linear, [part.bias for part in linear]).to(self.dtype)

    def forget(self, tower: Tower) -> None:
        """Free what was made of a tower's weights; they are prepared anew when they are needed again."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0].tower != tower}

    def _prepare(self, linear: Linear) -> Frozen:
        def weight() -> Tensor:
            # Not inference tensors, even in inference mode: training may use them later.
            with torch.inference_mode(False), torch.no_grad():
                return self.stacked(linear)[0].detach()

        with torch.inference_mode(False), torch.no_grad():
            bias = self.stacked(linear)[1]
            return Frozen(weight, None if bias is None else bias.detach())


def out_rows(part: Part) -> int:
    """How many outputs a part has."""
    return part.weight.shape[0] if part.rows is None else part.rows.stop - part.rows.start


def _stack(linear: Linear, tensors: list[Tensor | None]) -> Tensor:
    given = [tensor for tensor in tensors if tensor is not None]
    first, last = linear[0].rows, linear[-1].rows
    if first is not None and last is not None:
        return given[0][first.start : last.stop]
    return given[0] if len(given) == 1 else torch.cat(given)
