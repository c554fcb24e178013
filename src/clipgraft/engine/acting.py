"""Which adapter acts on what: one on all rows, or several on some rows each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.engine.linear import Update, low_rank_factors, rescale
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.models.anatomy import Linear, Part
from clipgraft.models.sites import Site


@dataclass(frozen=True)
class Acting:
    """One adapter as the engine reads it: its updates by site, and what it adds to the biases of norms."""

    layers: Mapping[Site, LoraLayer] = field(default_factory=dict)
    norms: Mapping[nn.Module, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter | None, norms: Mapping[str, nn.LayerNorm]) -> Acting:
        """An adapter, or none, given the model's norms by path."""
        if adapter is None:
            return cls()
        return cls(adapter.layers, {norms[path]: module.lora_bias for path, module in adapter.norms.items()})

    def updates(self, linear: Linear) -> list[Update]:
        """What acts on a map, with the outputs that each part has in it."""
        updates, start = [], 0
        for part in linear:
            stop = start + part.matrix.shape[0]
            if part.site in self.layers:
                updates.append(Update(self.layers[part.site], part, slice(start, stop)))
            start = stop
        return updates


@dataclass(frozen=True)
class Share:
    """The nodes that one adapter acts on: `nodes` of all, and `pooled` among the pooled ones."""

    acting: Acting
    nodes: slice
    pooled: slice | Tensor


@dataclass(frozen=True)
class Mix:
    """Adapters on some nodes each. Nothing here has gradients, and dropout does not act.

    What the base gives is computed for all nodes at once; each adapter adds its part in place.
    """

    shares: tuple[Share, ...]

    def times(self, length: int) -> Mix:
        """The same with `length` nodes for each one here."""
        return Mix(
            tuple(
                replace(share, nodes=slice(share.nodes.start * length, share.nodes.stop * length))
                for share in self.shares
            )
        )

    def linear(self, y: Tensor, x: Tensor, linear: Linear, pooled: bool) -> Tensor:
        """(N, out) that the base makes of (N, in) -> the same with the adapters of its rows."""
        for share in self.shares:
            updates = share.acting.updates(linear)
            if updates:
                _adapt(y, x, updates, share.pooled if pooled else share.nodes)
        return y

    def norm(self, y: Tensor, norm: nn.LayerNorm, pooled: bool) -> Tensor:
        """Norms with what adapters add to their bias."""
        for share in self.shares:
            if norm in share.acting.norms:
                y[share.pooled if pooled else share.nodes] += share.acting.norms[norm].to(y.dtype)
        return y

    def embed(self, y: Tensor, tokens: Tensor, part: Part) -> Tensor:
        """(N, dim) that the base's table gives for (N,) ids -> the same with adapters."""
        for share in self.shares:
            layer = share.acting.layers.get(part.site)
            if layer is not None:
                own = share.nodes
                y[own] = layer.adapt(y[own], tokens[own], part.weight, None)
        return y

    def positions(self, y: Tensor, indices: Tensor, part: Part) -> Tensor:
        """The same for positions."""
        for share in self.shares:
            layer = share.acting.layers.get(part.site)
            if layer is not None:
                own = share.nodes
                y[own] = layer.folded(part.weight).index_select(0, indices[own])
        return y


def _adapt(y: Tensor, x: Tensor, updates: list[Update], rows: slice | Tensor) -> None:
    """Let updates act on some rows of y, in place."""
    ours = y[rows]
    inputs = x[rows]
    slots, factors = low_rank_factors(updates)
    if factors:
        a = torch.cat(factors[0::2]) if len(factors) > 2 else factors[0]
        low = F.linear(inputs, a.to(x.dtype))
        column = 0
        for (outputs, r, scale), b in zip(slots, factors[1::2], strict=True):
            part = ours[:, outputs]
            part.addmm_(low[:, column : column + r], b.to(y.dtype).T, alpha=scale)
            column += r
    ours = rescale(ours, updates)
    if isinstance(rows, Tensor) or not all(update.layer.is_plain for update in updates):
        y[rows] = ours
