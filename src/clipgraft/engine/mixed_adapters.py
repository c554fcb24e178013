"""Apply one adapter to all rows of a batch, or several adapters to some rows each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.engine.linear import Update, rescale
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.models.architecture import Linear, Part
from clipgraft.models.sites import Site


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter as the engine uses it: its updates by site, and what it adds to the biases of norms."""

    layers: Mapping[Site, LoraLayer] = field(default_factory=dict)
    norms: Mapping[nn.Module, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter | None, norms: Mapping[str, nn.LayerNorm]) -> ActiveAdapter:
        """An adapter, or none, given the model's norms by path."""
        if adapter is None:
            return cls()
        return cls(adapter.layers, {norms[path]: module.lora_bias for path, module in adapter.norms.items()})

    def updates(self, linear: Linear) -> list[Update]:
        """Return the updates of a linear map, with the outputs that each part has in it."""
        return self.among(_outputs(linear))

    def among(self, parts: Sequence[tuple[Part, slice]]) -> list[Update]:
        """Return the updates of parts of a linear map, each with its outputs."""
        layers = self.layers
        return [Update(layers[part.site], part, outputs) for part, outputs in parts if part.site in layers]


@dataclass(frozen=True)
class AdapterShare:
    """The nodes of one adapter: `nodes` among all, `pooled` among the pooled ones."""

    adapter: ActiveAdapter
    nodes: slice
    pooled: slice | Tensor


@dataclass(frozen=True)
class MixedAdapters:
    """Adapters on some nodes each, without gradients and dropout.

    What the base gives is computed for all nodes at once; each adapter adds its part in place.
    """

    shares: tuple[AdapterShare, ...]

    def times(self, length: int) -> MixedAdapters:
        """Return the same adapters for `length` nodes in place of each node."""
        return MixedAdapters(
            tuple(
                replace(share, nodes=slice(share.nodes.start * length, share.nodes.stop * length))
                for share in self.shares
            )
        )

    def linear(self, y: Tensor, x: Tensor, linear: Linear, pooled: bool) -> Tensor:
        """(N, out) that the base makes of (N, in) -> the same with the adapters of its rows."""
        parts = _outputs(linear)
        for share in self.shares:
            updates = share.adapter.among(parts)
            if updates:
                _adapt(y, x, updates, share.pooled if pooled else share.nodes)
        return y

    def norm(self, y: Tensor, norm: nn.LayerNorm, pooled: bool) -> Tensor:
        """Add what adapters add to the bias of a layer norm."""
        for share in self.shares:
            if norm in share.adapter.norms:
                y[share.pooled if pooled else share.nodes] += share.adapter.norms[norm].to(y.dtype)
        return y

    def embed(self, y: Tensor, tokens: Tensor, part: Part) -> Tensor:
        """(N, dim) that the base's table gives for (N,) ids -> the same with adapters."""
        for share in self.shares:
            layer = share.adapter.layers.get(part.site)
            if layer is not None:
                own = share.nodes
                y[own] = layer.adapt(y[own], tokens[own], part.weight, None)
        return y

    def positions(self, y: Tensor, indices: Tensor, part: Part) -> Tensor:
        """(N, dim) that the base's table gives for (N,) positions -> the same with adapters."""
        for share in self.shares:
            layer = share.adapter.layers.get(part.site)
            if layer is not None:
                own = share.nodes
                y[own] = layer.folded(part.matrix).index_select(0, indices[own])
        return y


def _outputs(linear: Linear) -> list[tuple[Part, slice]]:
    """The parts of a map, each with the outputs that are its own."""
    stops = list(itertools.accumulate(part.matrix.shape[0] for part in linear))
    return [(part, slice(start, stop)) for part, start, stop in zip(linear, [0, *stops], stops, strict=False)]


def _adapt(y: Tensor, x: Tensor, updates: list[Update], rows: slice | Tensor) -> None:
    """Add updates to some rows of y, in place.

    With dozens of adapters the products are so small that every call beside them counts.
    """
    ours = y[rows]
    ranked = [(update, *update.layer.factors()) for update in updates if update.layer.r]
    if ranked:
        stacked = torch.cat([a for _, a, _ in ranked]) if len(ranked) > 1 else ranked[0][1]
        low, column = F.linear(x[rows], _matrix(stacked, x.dtype)), 0
        for update, a, b in ranked:
            own = low[:, column : column + a.shape[0]]
            ours[:, update.rows].addmm_(own, _matrix(b, y.dtype).T, alpha=update.layer.scaling)
            column += a.shape[0]
    if not all(update.layer.is_plain for update in updates):
        y[rows] = rescale(ours, updates)
    elif isinstance(rows, Tensor):
        y[rows] = ours


def _matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A or B as a matrix in a type; those of a convolution are flattened."""
    matrix = factor if factor.ndim == 2 else factor.flatten(1)
    return matrix if matrix.dtype == dtype else matrix.to(dtype)
