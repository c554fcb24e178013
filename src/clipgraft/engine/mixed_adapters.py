"""Apply one adapter to all rows of a batch, or several adapters to some rows each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.engine.linear import Update, rescaling
from clipgraft.engine.packing import by_mkl
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.lora.variants import PlainLora
from clipgraft.models.architecture import Linear, Part
from clipgraft.models.device import queued
from clipgraft.models.sites import Site

Shape: TypeAlias = tuple[object, ...]
_FEW, _ABOUT_AS_MANY = 64, 0.5
"""Shares of at most so many rows are computed together, if the least has this share of the most."""


@dataclass(frozen=True)
class Factors:
    """The B of some updated parts of one linear map that are alike, P of them, for one batched product.

    Attributes:
        b: (P, width, r).
        scale: of all.
        start, step: part number p changes the `width` outputs from start + p·step on.
        columns: theirs among the Σr of all updated parts, part by part.
    """

    b: Tensor
    scale: float
    start: int
    step: int
    columns: slice

    @property
    def shape(self) -> Shape:
        """What factors that are multiplied together have in common."""
        return (*self.b.shape, self.start, self.step, self.columns.start)

    def parts_of(self, y: Tensor) -> Tensor:
        """The outputs that they change, (N, P, width), a view of (N, out)."""
        strides = (y.stride(0), self.step * y.stride(1), y.stride(1))
        offset = y.storage_offset() + self.start * y.stride(1)
        return y.as_strided((len(y), *self.b.shape[:2]), strides, offset)

    def add(self, y: Tensor, low: Tensor) -> None:
        """Change (N, out) in place by (N, Σr)."""
        own = low[:, self.columns].view(len(low), len(self.b), self.b.shape[2]).transpose(0, 1)
        parts, b = self.parts_of(y).transpose(0, 1), self.b.transpose(1, 2)
        if y.dtype == low.dtype:
            parts.baddbmm_(own, b, alpha=self.scale)
        else:
            parts.add_(torch.bmm(own, b), alpha=self.scale)


def _factors(updates: Sequence[tuple[Update, Tensor]]) -> Iterator[Factors]:
    """B, (out, r), of updates with what each changes; those that are alike together."""
    stops = list(itertools.accumulate(b.shape[1] for _, b in updates))
    steps = {after.rows.start - own.rows.start for (own, _), (after, _) in itertools.pairwise(updates)}
    if len({(*b.shape, update.layer.scaling) for update, b in updates}) == 1 and len(steps) <= 1:
        first, b = updates[0][0], torch.stack([b for _, b in updates])
        step = next(iter(steps), 0)
        yield Factors(b, first.layer.scaling, first.rows.start, step, slice(0, stops[-1]))
        return
    for (update, b), stop in zip(updates, stops, strict=True):
        columns = slice(stop - b.shape[1], stop)
        yield Factors(b[None], update.layer.scaling, update.rows.start, 0, columns)


@dataclass(frozen=True)
class Product:
    """What one adapter makes of one linear map: y·f + g of y + s·x·Aᵀ·Bᵀ, without gradients.

    Attributes:
        a: (Σr, in), the A of every updated part, stacked; None where there is none.
        factors: the B of all of them.
        factor, addend: f and g, (out,), of variants that rescale and of biases; None for neither.
    """

    a: Tensor | None
    factors: tuple[Factors, ...]
    factor: Tensor | None
    addend: Tensor | None

    @classmethod
    def of(cls, updates: Sequence[Update], out: int, dtype: torch.dtype) -> Product:
        """The product of the updates of a map of `out` outputs, in the type of `small_products`."""
        ranked = [(update, *update.layer.factors()) for update in updates if update.layer.r]
        matrices = [_matrix(a, dtype) for _, a, _ in ranked]
        factor, addend = rescaling(updates, out) or (None, None)
        return cls(
            None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat(matrices),
            tuple(_factors([(update, _matrix(b, dtype)) for update, _, b in ranked])),
            None if factor is None else factor.to(dtype),
            None if addend is None else addend.to(dtype),
        )

    @functools.cached_property
    def shape(self) -> Shape | None:
        """What products that are added together have in common; None for one that must be added alone."""
        if self.a is None or self.factor is not None:
            return None
        return (*self.a.shape, *(factors.shape for factors in self.factors))

    def tensors(self) -> Iterator[Tensor]:
        """What it holds; some may be views of others."""
        held = (self.a, self.factor, self.addend, *(factors.b for factors in self.factors))
        return (tensor for tensor in held if tensor is not None)

    def scaled(self, strength: float) -> Product:
        """The product of the same adapter at a strength; of those that neither rescale nor add."""
        scaled = tuple(replace(own, scale=strength * own.scale) for own in self.factors)
        return replace(self, factors=scaled)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add s·x·Aᵀ·Bᵀ of (N, in), which is of A's type, to (N, out) in place."""
        if self.a is not None:
            low = F.linear(x, self.a)
            for factors in self.factors:
                factors.add(y, low)

    def rescaling(self) -> tuple[Tensor, Tensor] | None:
        """f and g; None for neither."""
        return None if self.factor is None or self.addend is None else (self.factor, self.addend)


@dataclass(frozen=True)
class LiveProduct:
    """What the updates of one linear map make of it, read where they are: nothing of them is copied.

    To stack A and B, as `Product` does, takes as long as their products with the few rows of an adapter.
    """

    updates: Sequence[Update]
    out: int

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `Product.add`."""
        for update in self.updates:
            layer = update.layer
            if layer.r:
                a, b = layer.factors()
                low, ours = F.linear(x, _matrix(a, x.dtype)), y[:, update.rows]
                b = _matrix(b, x.dtype)
                if y.dtype == x.dtype:
                    ours.addmm_(low, b.T, alpha=layer.scaling)
                else:
                    ours.add_(F.linear(low, b), alpha=layer.scaling)

    def rescaling(self) -> tuple[Tensor, Tensor] | None:
        """As `Product.rescaling`."""
        return rescaling(self.updates, self.out)


def add_rows(product: Product | LiveProduct, y: Tensor, x: Tensor, rows: slice | Tensor) -> None:
    """Add what a product makes of some rows of (N, in) to those of (N, out), in place."""
    ours = y[rows]
    product.add(ours, x[rows])
    if isinstance(rows, Tensor):
        y[rows] = ours


@dataclass(frozen=True)
class Bundle:
    """Shares of some rows each whose products are alike, so that one operation computes all of them.

    Attributes:
        shares: their numbers, K.
        gather: (K · P,) the rows of each share, the first once more where it has fewer than P.
        cells: (n,) which of the K · P are rows; None for all.
        rows: those n rows.
    """

    shares: tuple[int, ...]
    gather: Tensor
    cells: Tensor | None
    rows: slice | Tensor

    @classmethod
    def of(cls, shares: Sequence[int], rows: Sequence[slice | Tensor], device: torch.device) -> Bundle:
        """The shares of these numbers, and the rows of each."""
        counts = torch.tensor([_count(own) for own in rows])
        numbers = torch.arange(int(counts.max()))
        exists = numbers < counts[:, None]
        starts = (counts.cumsum(0) - counts)[:, None]
        places = torch.where(exists, starts + numbers, starts).flatten()
        own = torch.cat([_numbers(part, device) for part in rows])
        cells = None if bool(exists.all()) else exists.flatten().nonzero().flatten()
        return cls(
            tuple(shares),
            own[queued(places, device)],
            None if cells is None else queued(cells, device),
            _joined(rows) or own,
        )

    def add(self, y: Tensor, x: Tensor, products: Sequence[Product]) -> None:
        """(N, out) that the base makes of (N, in), of A's type: change the rows of all shares, in place."""
        a = torch.stack([product.a for product in products if product.a is not None])
        low = torch.bmm(x.index_select(0, self.gather).view(len(products), -1, x.shape[1]), a.transpose(1, 2))
        for factors in zip(*(product.factors for product in products), strict=True):
            first = factors[0]
            b = torch.cat([own.b for own in factors])
            own, scale = low[:, :, first.columns].view(*low.shape[:2], len(first.b), -1), first.scale
            if any(other.scale != scale for other in factors):
                scales = torch.tensor([each.scale for each in factors], dtype=own.dtype)
                own, scale = own * queued(scales, own.device)[:, None, None, None], 1.0
            update = torch.bmm(own.transpose(1, 2).flatten(0, 1), b.transpose(1, 2))
            update = update.view(len(factors), -1, *update.shape[1:]).transpose(1, 2).flatten(0, 1)
            if self.cells is not None:
                update = update.index_select(0, self.cells)
            if isinstance(self.rows, slice):
                first.parts_of(y)[self.rows].add_(update, alpha=scale)
            else:
                first.parts_of(y).index_add_(0, self.rows, update.to(y.dtype), alpha=scale)


def bundles(
    shapes: Sequence[Shape | None], rows: Sequence[slice | Tensor], device: torch.device
) -> tuple[Bundle, ...]:
    """Bundle shares of few rows, about as many each, whose products have one shape."""
    counts = [_count(own) for own in rows]
    alike: dict[Shape, list[int]] = {}
    for number, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        if shape is not None and 0 < count <= _FEW:
            alike.setdefault(shape, []).append(number)
    found = []
    for numbers in alike.values():
        numbers.sort(key=lambda number: (-counts[number], number))
        while numbers:
            least = _ABOUT_AS_MANY * counts[numbers[0]]
            together = [number for number in numbers if counts[number] >= least]
            del numbers[: len(together)]
            if len(together) > 1:
                together.sort()
                found.append(Bundle.of(together, [rows[number] for number in together], device))
    return tuple(found)


def _count(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _numbers(rows: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows


def _joined(rows: Sequence[slice | Tensor]) -> slice | None:
    """The one slice that slices make up which follow each other; None for others."""
    slices = [own for own in rows if isinstance(own, slice)]
    follows = all(own.stop == after.start for own, after in itertools.pairwise(slices))
    return slice(slices[0].start, slices[-1].stop) if follows and len(slices) == len(rows) else None


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

    def product(
        self, key: str, parts: Sequence[tuple[Part, slice]], dtype: torch.dtype, stack: bool
    ) -> Product | LiveProduct | None:
        """What it makes of a linear map, in the type of `small_products`; None where it changes nothing.

        Without `stack` only what was prepared is stacked.
        """
        if self.prepared is not None:
            found = self.prepared.get(key)
            if found is None or found.a is None or found.a.dtype == dtype:
                return found
        updates, out = self.among(parts), parts[-1][1].stop
        if not updates:
            return None
        return Product.of(updates, out, dtype) if stack else LiveProduct(updates, out)


def prepare(adapter: Adapter, linears: Iterable[Linear], dtype: torch.dtype) -> None:
    """Make the products of an adapter that will not change any more, so that none is made at its use.

    Of adapters of the type that products are made in nothing is copied for good: A and B become views of the
    stacks.
    """
    active = ActiveAdapter(adapter.layers)
    prepared: dict[str, Product] = {}
    with torch.no_grad():
        for linear in linears:
            updates = active.updates(linear)
            if not updates:
                continue
            out = sum(part.outputs for part in linear)
            device = linear[0].matrix.device
            product = prepared[key_of(linear)] = Product.of(updates, out, small_products(dtype, device))
            start = 0
            for layer, b in zip(
                (update.layer for update in updates if update.layer.r),
                (b for factors in product.factors for b in factors.b),
                strict=True,
            ):
                stop = start + b.shape[1]
                if type(layer) is PlainLora and layer.lora_start_A is None and product.a is not None:
                    _share(layer.lora_A, product.a[start:stop])
                    _share(layer.lora_B, b)
                start = stop
    adapter.prepared = prepared


def _share(parameter: nn.Parameter, matrix: Tensor) -> None:
    if parameter.dtype == matrix.dtype:
        parameter.data = matrix.view(parameter.shape)


def small_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that products with A and B are computed in, where the base computes in `dtype`.

    On a CPU at least fp32: its kernels for bf16 are compiled anew for each number of rows, which takes longer
    than all products of a batch.
    """
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


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
    _bundles: dict[Hashable, tuple[Bundle, ...]] = field(default_factory=dict, repr=False, compare=False)

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
        dtype = small_products(x.dtype, x.device)
        together = not by_mkl(dtype, x.device)  # to gather and to stack costs as much there as what it saves
        products = [share.adapter.product(key, parts, dtype, together) for share in self.shares]
        if all(product is None for product in products):
            return y
        self._add(y, x.to(dtype), products, pooled)
        for number, product in enumerate(products):
            found = None if product is None else product.rescaling()
            if found is not None:
                factor, addend = (vector.to(dtype) for vector in found)
                rows = self._rows(number, pooled)
                y[rows] = torch.addcmul(addend, y[rows], factor).to(y.dtype)
        return y

    def _add(
        self, y: Tensor, x: Tensor, products: Sequence[Product | LiveProduct | None], pooled: bool
    ) -> None:
        """Add the updates of all shares, those of stacked products that are alike together."""
        stacked = {number: own for number, own in enumerate(products) if isinstance(own, Product)}
        bundled: tuple[Bundle, ...] = ()
        if not by_mkl(x.dtype, x.device):
            shapes = tuple(stacked[n].shape if n in stacked else None for n in range(len(products)))
            bundled = self._bundled(shapes, pooled, x.device)
        for bundle in bundled:
            bundle.add(y, x, [stacked[number] for number in bundle.shares])
        done = {number for bundle in bundled for number in bundle.shares}
        for number, product in enumerate(products):
            if product is not None and number not in done:
                add_rows(product, y, x, self._rows(number, pooled))

    def _rows(self, number: int, pooled: bool) -> slice | Tensor:
        share = self.shares[number]
        return share.pooled if pooled else share.nodes

    def _bundled(
        self, shapes: tuple[Shape | None, ...], pooled: bool, device: torch.device
    ) -> tuple[Bundle, ...]:
        """`bundles`, made once for all maps whose products have the same shapes."""
        key = (shapes, pooled)
        if key not in self._bundles:
            rows = [self._rows(number, pooled) for number in range(len(self.shares))]
            self._bundles[key] = bundles(shapes, rows, device)
        return self._bundles[key]

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
