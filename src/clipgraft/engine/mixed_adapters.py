"""Apply one adapter to all rows of a batch, or several adapters to some rows each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.engine.linear import Update, rescaling
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.lora.variants import PlainLora
from clipgraft.models.architecture import Linear, Part
from clipgraft.models.sites import Site


@dataclass(frozen=True)
class Product:
    """What one adapter makes of one linear map: y·f + g of y + s·x·Aᵀ·Bᵀ, without gradients.

    Attributes:
        a: (Σr, in), the A of every updated part, stacked; None where there is none.
        parts: the outputs of each part, its columns among the Σr, its B as (out, r), and its scale.
        together: (parts, r, out), every B transposed, where the parts are alike and make up all outputs.
        factor, addend: f and g, (out,), of variants that rescale and of biases; None for neither.
    """

    a: Tensor | None
    parts: tuple[tuple[slice, slice, Tensor, float], ...]
    together: Tensor | None
    factor: Tensor | None
    addend: Tensor | None

    @classmethod
    def of(cls, updates: Sequence[Update], out: int, dtype: torch.dtype) -> Product:
        """The product of the updates of a map of `out` outputs, in a compute type."""
        ranked = [(update, *update.layer.factors()) for update in updates if update.layer.r]
        matrices = [_matrix(a, dtype) for _, a, _ in ranked]
        stops = list(itertools.accumulate(len(a) for a in matrices))
        columns = [slice(stop - len(a), stop) for stop, a in zip(stops, matrices, strict=True)]
        factor, addend = rescaling(updates, out) or (None, None)
        return cls(
            None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat(matrices),
            tuple(
                (update.rows, own, _matrix(b, dtype), update.layer.scaling)
                for (update, _, b), own in zip(ranked, columns, strict=True)
            ),
            None,
            None if factor is None else factor.to(dtype),
            None if addend is None else addend.to(dtype),
        )

    def stacked(self, out: int) -> Product:
        """The same with every B in one tensor, for a product that is used again."""
        shapes = {b.shape for _, _, b, _ in self.parts}
        scales = {scale for *_, scale in self.parts}
        if len(self.parts) < 2 or len(shapes) > 1 or len(scales) > 1:
            return self
        if sum(b.shape[0] for _, _, b, _ in self.parts) != out:
            return self
        stack = torch.stack([b for _, _, b, _ in self.parts])
        parts = tuple((*part[:2], b, part[3]) for part, b in zip(self.parts, stack, strict=True))
        return replace(self, parts=parts, together=stack.transpose(1, 2))

    def tensors(self) -> Iterator[Tensor]:
        """What it holds; some may be views of others."""
        held = (self.a, self.together, self.factor, self.addend, *(b for _, _, b, _ in self.parts))
        return (tensor for tensor in held if tensor is not None)

    def scaled(self, strength: float) -> Product:
        """The product of the same adapter at a strength; of those that neither rescale nor add."""
        return replace(self, parts=tuple((*part[:3], strength * part[3]) for part in self.parts))

    def add(self, y: Tensor, x: Tensor, rows: slice | Tensor) -> None:
        """(N, out) that the base makes of (N, in): change some rows, in place."""
        ours = y[rows]
        if self.a is not None:
            low = F.linear(x[rows], self.a)
            if self.together is not None:
                count, scale = len(self.parts), self.parts[0][3]
                lows = low.view(len(low), count, -1).transpose(0, 1)
                whole = ours.view(len(ours), count, -1).transpose(0, 1)
                whole.baddbmm_(lows, self.together, alpha=scale)
            else:
                for outputs, columns, b, scale in self.parts:
                    ours[:, outputs].addmm_(low[:, columns], b.T, alpha=scale)
        if self.factor is not None and self.addend is not None:
            y[rows] = torch.addcmul(self.addend, ours, self.factor)
        elif isinstance(rows, Tensor):
            y[rows] = ours


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter as the engine uses it: its updates by site, and what it adds to the biases of norms.

    Attributes:
        prepared: its products by `key_of` their map; None where they are made at every use.
    """

    layers: Mapping[Site, LoraLayer] = field(default_factory=dict)
    norms: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Product] | None = None

    @classmethod
    def of(cls, adapter: Adapter | None, norms: Mapping[str, nn.LayerNorm]) -> ActiveAdapter:
        """An adapter, or none, given the model's norms by path."""
        if adapter is None:
            return cls()
        own: dict[nn.Module, Tensor] = {
            norms[path]: module.lora_bias for path, module in adapter.norms.items()
        }
        return cls(adapter.layers, own, adapter.prepared)

    def updates(self, linear: Linear) -> list[Update]:
        """Return the updates of a linear map, with the outputs that each part has in it."""
        return self.among(_outputs(linear))

    def among(self, parts: Sequence[tuple[Part, slice]]) -> list[Update]:
        """Return the updates of parts of a linear map, each with its outputs."""
        layers = self.layers
        return [Update(layers[part.site], part, outputs) for part, outputs in parts if part.site in layers]

    def product(self, key: str, parts: Sequence[tuple[Part, slice]], dtype: torch.dtype) -> Product | None:
        """What it makes of a linear map; None where it changes nothing."""
        if self.prepared is not None:
            found = self.prepared.get(key)
            if found is None or found.a is None or found.a.dtype == dtype:
                return found
        updates = self.among(parts)
        return Product.of(updates, parts[-1][1].stop, dtype) if updates else None


def prepare(adapter: Adapter, linears: Iterable[Linear], dtype: torch.dtype) -> None:
    """Make the products of an adapter that will not change any more, so that none is made at its use.

    Of the compute type's own adapters nothing is copied for good: A and B become views of the stacks.
    """
    active = ActiveAdapter(adapter.layers)
    prepared: dict[str, Product] = {}
    with torch.no_grad():
        for linear in linears:
            updates = active.updates(linear)
            if not updates:
                continue
            out = sum(part.outputs for part in linear)
            product = prepared[key_of(linear)] = Product.of(updates, out, dtype).stacked(out)
            ranked = [update.layer for update in updates if update.layer.r]
            for layer, (_, columns, b, _) in zip(ranked, product.parts, strict=True):
                if type(layer) is PlainLora and layer.lora_start_A is None and product.a is not None:
                    _share(layer.lora_A, product.a[columns])
                    _share(layer.lora_B, b)
    adapter.prepared = prepared


def _share(parameter: nn.Parameter, matrix: Tensor) -> None:
    if parameter.dtype == matrix.dtype:
        parameter.data = matrix.view(parameter.shape)


def key_of(linear: Linear) -> str:
    """The name of a linear map: the sites of its parts."""
    return "+".join(str(part.site) for part in linear)


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
        parts, key = _outputs(linear), key_of(linear)
        for share in self.shares:
            product = share.adapter.product(key, parts, x.dtype)
            if product is not None:
                product.add(y, x, share.pooled if pooled else share.nodes)
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
    stops = list(itertools.accumulate(part.outputs for part in linear))
    return [(part, slice(start, stop)) for part, start, stop in zip(linear, [0, *stops], stops, strict=False)]


def _matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A or B as a matrix in a type; those of a convolution are flattened."""
    matrix = factor if factor.ndim == 2 else factor.flatten(1)
    return matrix if matrix.dtype == dtype else matrix.to(dtype)
