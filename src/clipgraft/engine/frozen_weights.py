"""Base weights in the compute type: frozen ones are prepared once, trained ones at every use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.models.architecture import Linear
from clipgraft.models.sites import Site, Tower


class FrozenWeight:
    """A frozen (out, in) weight W with its bias, in one piece or in several, one below the other.

    Where that is asked for and supported, W and Wᵀ are kept in the blocked layout of oneDNN: torch brings a
    plain weight into it at every product, which costs a fifth of the product for a batch of captions. Wᵀ is
    packed when it is first needed, which in inference is never.

    Attributes:
        shape: (out, in).
        packs: whether the blocked layout is used.
    """

    def __init__(
        self, weights: Callable[[], list[Tensor]], biases: Sequence[Tensor | None], pack: bool = True
    ) -> None:
        """`weights` returns the pieces of W in the compute type at every call."""
        pieces = weights()
        first = pieces[0]
        self.shape: tuple[int, int] = (sum(piece.shape[0] for piece in pieces), first.shape[1])
        self.packs = pack and first.device.type == "cpu" and first.dtype == torch.bfloat16 and packing_works()
        self._make = weights
        self._pieces = [_packed(torch.cat(pieces))] if self.packs else pieces
        self._biases = [_joined(biases)] if self.packs else list(biases)
        self._transposed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b, (N, in) -> (N, out)."""
        if self.packs:
            return _packed_product(x, self._pieces[0], self._biases[0])
        parts = [F.linear(x, w, b) for w, b in zip(self._pieces, self._biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def backward(self, grad: Tensor) -> Tensor:
        """g·W, (N, out) -> (N, in)."""
        if not self.packs:
            columns = torch.split(grad, [piece.shape[0] for piece in self._pieces], dim=1)
            total: Tensor = columns[0] @ self._pieces[0]
            for column, piece in zip(columns[1:], self._pieces[1:], strict=True):
                total.addmm_(column, piece)
            return total
        if self._transposed is None:
            self._transposed = _packed(torch.cat(self._make()).T)
        return _packed_product(grad, self._transposed, None)


class WeightCache:
    """Base weights in one compute type; those of frozen weights are kept.

    Of weights that are stored in that type already nothing is copied, unless `pack` lets them be brought into
    a faster layout.
    """

    def __init__(self, dtype: torch.dtype, pack: bool = True) -> None:
        self.dtype = dtype
        self._pack = pack
        self._kept: dict[tuple[Site, ...], tuple[Hashable, FrozenWeight]] = {}

    def frozen(self, linear: Linear) -> FrozenWeight | None:
        """Return a linear map prepared for products; None if one of its weights needs a gradient."""
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
        pieces, biases = self._pieces(linear)
        given = [bias for bias in biases if bias is not None]
        return _stacked(pieces), _stacked(given) if given else None

    def forget(self, tower: Tower) -> None:
        """Free the prepared weights of a tower; they are prepared again at their next use."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0].tower != tower}

    def _prepare(self, linear: Linear) -> FrozenWeight:
        # Not inference tensors, even in inference mode: training may use them later.
        def detached() -> tuple[list[Tensor], list[Tensor | None]]:
            with torch.inference_mode(False), torch.no_grad():
                pieces, biases = self._pieces(linear)
                return [p.detach() for p in pieces], [None if b is None else b.detach() for b in biases]

        return FrozenWeight(lambda: detached()[0], detached()[1], self._pack)

    def _pieces(self, linear: Linear) -> tuple[list[Tensor], list[Tensor | None]]:
        """The weights and biases of a map in the compute type; fused neighbours are one piece."""
        first, last = linear[0], linear[-1]
        if first.rows is not None and last.rows is not None:
            rows = slice(first.rows.start, last.rows.stop)
            bias = None if first.bias is None else first.bias[rows]
            sources = [(first.weight[rows], bias)]
        else:
            sources = [(part.matrix.flatten(1), part.bias) for part in linear]
        weights = [weight.to(self.dtype) for weight, _ in sources]
        return weights, [None if bias is None else bias.to(self.dtype) for _, bias in sources]


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@functools.cache
def packing_works() -> bool:
    """Whether this torch can pack bf16 weights, and multiplies by them to the same bits as by plain ones.

    The operators are those that torch's own compiler emits; they are not promised to stay as they are.
    """
    x, weight, bias = (torch.linspace(-1, 1, n).to(torch.bfloat16) for n in (3 * 16, 32 * 16, 32))
    x, weight = x.view(3, 16), weight.view(32, 16)
    try:
        return torch.equal(_packed_product(x, _packed(weight), bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    return torch.cat(given) if given else None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
