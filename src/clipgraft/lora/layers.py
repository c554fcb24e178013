"""One low-rank update: A, B and how they act on an input.

W' = W + s·B·A, with s = α/r (Hu et al. 2021, arXiv:2106.09685, eq. 3) or α/√r (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732); with DoRA W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖ (Liu et al. 2024, arXiv:2402.09353, eq. 5),
one magnitude and one norm for each output. Weights have PEFT's shapes, so that files need no transposition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.models.sites import SiteKind, SiteRef

_BY_ROW: tuple[SiteKind, ...] = ("embedding", "table")


class LoraLayer(nn.Module):
    """The low-rank update of one site; holds no base weight.

    All weights are fp32 whatever the base's type.

    Attributes:
        lora_A, lora_B: (r, in), (out, r) for linear sites; (r, rows), (dim, r) for embeddings and position
            tables; (r, in, h, w), (out, r, 1, 1) for the patch convolution.
        lora_magnitude: (out,) of DoRA, else None.
        lora_bias: (out,) what is added to the base's bias, where that trains too; else None.
        lora_start_A, lora_start_B: the frozen product that a start on the base's own directions takes off
            again (PiSSA); None for other starts.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_bias: nn.Parameter | None
    lora_start_A: Tensor | None
    lora_start_B: Tensor | None

    def __init__(
        self,
        ref: SiteRef,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape_a, shape_b = ref.lora_shapes(r)
        self.kind: SiteKind = ref.kind
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32))
        self.lora_magnitude = nn.Parameter(torch.ones(shape_b[0])) if use_dora else None
        self.lora_bias = nn.Parameter(torch.zeros(shape_b[0])) if bias else None
        self.register_buffer("lora_start_A", None)
        self.register_buffer("lora_start_B", None)
        if r:
            self.reset_parameters()
        else:
            self.lora_A.requires_grad_(False)
            self.lora_B.requires_grad_(False)

    def reset_parameters(self) -> None:
        """A Kaiming, B zero; the other way round for embeddings. Either way ΔW starts at exactly zero.

        With A zero, a token that never occurs in training keeps its base embedding to the bit; a random A
        would move it as soon as B moves.
        """
        if self.kind in _BY_ROW:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @property
    def is_plain(self) -> bool:
        """Whether W + s·B·A is all there is to it."""
        return self.lora_magnitude is None and self.lora_bias is None

    @property
    def is_zero(self) -> bool:
        """Whether the update is known to change nothing."""
        return self.is_plain and self.lora_start_A is None and not bool(self.lora_B.any())

    @property
    def starts_at_zero(self) -> nn.Parameter:
        """The factor that `reset_parameters` sets to zero."""
        return self.lora_A if self.kind in _BY_ROW else self.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update as it stands, a frozen start included: of rank 2r with one, else r."""
        if self.lora_start_A is None or self.lora_start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_start_A]), torch.cat(
            [self.lora_B, -self.lora_start_B], dim=1
        )

    def forward(self, x: Tensor, host: nn.Module | None = None) -> Tensor:
        """What s·B·A adds to the host's output for the host's input `x`.

        (..., in) -> (..., out) for linear sites, (...) ids -> (..., dim) for embeddings, (N, in, H, W) ->
        (N, out, H', W') for a convolution with the stride and padding of `host`. Dropout acts on `x` in
        training mode, except on ids. The result has the type of A (or of autocast).
        """
        a, b = self.factors()
        if self.kind == "embedding":
            return F.embedding(x, a.T) @ b.T * self.scaling
        x = x.to(a.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if isinstance(host, nn.Conv2d):
            x = F.conv2d(x, a, None, host.stride, host.padding, host.dilation)
            return F.conv2d(x, b) * self.scaling
        return F.linear(F.linear(x, a), b) * self.scaling

    def adapt(
        self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, host: nn.Module | None = None
    ) -> Tensor:
        """The host's output with the update: `y` is what the base gives for `x`, shapes as in `forward`.

        `weight` is the base's in canonical shape (`SiteRef.shape`), `bias` the base's (out,), both needed for
        DoRA alone.
        """
        update: Tensor = self(x, host)
        if self.is_plain:
            return y + update.to(y.dtype)

        def outputs(vector: Tensor) -> Tensor:
            return vector[:, None, None] if isinstance(host, nn.Conv2d) else vector

        if self.lora_magnitude is None:
            adapted = y + update.to(y.dtype)
        else:
            offset = None if bias is None else outputs(bias)
            adapted = ((y if offset is None else y - offset) + update) * outputs(self.scale(weight))
            adapted = adapted.to(y.dtype) if offset is None else adapted.to(y.dtype) + offset
        return adapted if self.lora_bias is None else adapted + outputs(self.lora_bias).to(y.dtype)

    def scale(self, weight: Tensor) -> Tensor:
        """DoRA's m / ‖W + s·B·A‖, (out,); the norm counts as a constant, as the paper does (section 4.3)."""
        assert self.lora_magnitude is not None
        scale: Tensor = self.lora_magnitude / self.norm(weight)
        return scale

    def norm(self, weight: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each output, (out,), for the base's W in canonical shape; without gradient."""
        with torch.no_grad():
            norm: Tensor = torch.linalg.vector_norm(self._moved(weight), dim=1)
        return norm

    def reset_magnitude(self, weight: Tensor) -> None:
        """Let DoRA start as the base: m is the norm of the base's rows and of the update on them."""
        if self.lora_magnitude is not None:
            with torch.no_grad():
                self.lora_magnitude.copy_(self.norm(weight))

    def folded(self, weight: Tensor) -> Tensor:
        """W' for the base's W, both in canonical shape, computed in fp32 and of the type of W."""
        if self.lora_magnitude is None:
            return weight + self.delta_weight().to(weight.dtype)
        matrix = self._moved(weight) * self.scale(weight)[:, None]
        return self._canonical(matrix, weight.shape).to(weight.dtype)

    def delta_weight(self) -> Tensor:
        """s·B·A in the canonical shape of the site's weight (`SiteRef.shape`), in the type of A."""
        a, b = self.factors()
        delta = b.flatten(1) @ a.flatten(1) * self.scaling
        return self._canonical(delta, (b.shape[0], *a.shape[1:]))

    def matrix(self, weight: Tensor) -> Tensor:
        """A canonical weight as the (out, in) matrix that B·A is added to, as a view."""
        return weight.T if self.kind in _BY_ROW else weight.flatten(1)

    def _moved(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        wide = self.matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))
        return torch.addmm(wide, b.flatten(1), a.flatten(1), alpha=self.scaling)

    def _canonical(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.T if self.kind in _BY_ROW else matrix.reshape(shape)

    def extra_repr(self) -> str:
        kinds = " DoRA" if self.lora_magnitude is not None else ""
        return f"{self.kind}{kinds}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class BiasLayer(nn.Module):
    """What an adapter adds to the bias of a layer norm, (dim,)."""

    lora_bias: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lora_bias = nn.Parameter(torch.zeros(dim))


class Slot(nn.Module):
    """The updates of one place by adapter name, of which at most one acts.

    Attributes:
        acting: the name of the adapter that acts; None, or that of one without an update here, for none.
    """

    acting: str | None = None

    def put(self, name: str, layer: nn.Module) -> None:
        """Hang an adapter's update here."""
        self.add_module(_key(name), layer)

    def drop(self, name: str) -> None:
        """Take an adapter's update off, if there is one."""
        self._modules.pop(_key(name), None)

    @property
    def current(self) -> LoraLayer | None:
        """The update of a site that acts."""
        layer = self._acting_layer()
        return layer if isinstance(layer, LoraLayer) else None

    @property
    def current_bias(self) -> BiasLayer | None:
        """The addition to the bias of a norm that acts."""
        layer = self._acting_layer()
        return layer if isinstance(layer, BiasLayer) else None

    def _acting_layer(self) -> nn.Module | None:
        return None if self.acting is None else self._modules.get(_key(self.acting))


_TAKEN = frozenset(dir(Slot()))


def _key(name: str) -> str:
    """What a module calls an adapter: an adapter named `half` must not hide a module's own method."""
    return f"@{name}" if name in _TAKEN else name
