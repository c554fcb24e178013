"""Base weights in the type that is computed in: frozen ones are prepared once, trained ones at every use."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from clipgraft.engine.products import Frozen
from clipgraft.models.anatomy import Linear
from clipgraft.models.sites import Site, Tower


class Weights:
    """Looks weights up in one compute type, and keeps what it made of frozen ones.

    Of weights that are stored in that type already nothing is copied, unless `pack` lets them be brought into
    a faster layout.
    """

    def __init__(self, dtype: torch.dtype, pack: bool = True) -> None:
        self.dtype = dtype
        self._pack = pack
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
        pieces, biases = self._pieces(linear)
        given = [bias for bias in biases if bias is not None]
        return _joined(pieces), _joined(given) if given else None

    def forget(self, tower: Tower) -> None:
        """Free what was made of a tower's weights; they are prepared anew when they are needed again."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0].tower != tower}

    def _prepare(self, linear: Linear) -> Frozen:
        # Not inference tensors, even in inference mode: training may use them later.
        def detached() -> tuple[list[Tensor], list[Tensor | None]]:
            with torch.inference_mode(False), torch.no_grad():
                pieces, biases = self._pieces(linear)
                return [p.detach() for p in pieces], [None if b is None else b.detach() for b in biases]

        return Frozen(lambda: detached()[0], detached()[1], self._pack)

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


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
