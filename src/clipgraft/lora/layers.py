"""One low-rank update: A, B and how they act on an input.

ΔW = scaling · B·A, with scaling α/r (Hu et al. 2021, arXiv:2106.09685, eq. 3) or α/√r (rsLoRA, Kalajdzievski
2023, arXiv:2312.03732). Weights are kept in PEFT's shapes so that files need no transposition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.models.sites import SiteKind, SiteRef


class LoraLayer(nn.Module):
    """The low-rank update of one site; holds no base weight.

    `lora_A` and `lora_B` are fp32 whatever the base's type: (r, in), (out, r) for linear sites; (r, rows),
    (dim, r) for embeddings and position tables; (r, in, h, w), (out, r, 1, 1) for the patch convolution.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, ref: SiteRef, r: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        shape_a, shape_b = ref.lora_shapes(r)
        self.kind: SiteKind = ref.kind
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = dropout
        self.enabled = True
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming, B zero; the other way round for embeddings. Either way ΔW starts at exactly zero.

        With A zero, a token that never occurs in training keeps its base embedding to the bit; a random A
        would move it as soon as B moves.
        """
        if self.kind in ("embedding", "table"):
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, host: nn.Module | None = None) -> Tensor:
        """What the update adds to the host's output for the host's input `x`.

        (..., in) -> (..., out) for linear sites, (...) ids -> (..., dim) for embeddings, (N, in, H, W) ->
        (N, out, H', W') for a convolution with the stride and padding of `host`. Dropout acts on `x` in
        training mode, except on ids. The result has the type of A (or of autocast).
        """
        if self.kind == "embedding":
            return F.embedding(x, self.lora_A.T) @ self.lora_B.T * self.scaling
        x = x.to(self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if isinstance(host, nn.Conv2d):
            x = F.conv2d(x, self.lora_A, None, host.stride, host.padding, host.dilation)
            return F.conv2d(x, self.lora_B) * self.scaling
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    def delta_weight(self) -> Tensor:
        """ΔW in the canonical shape of the site's weight (`SiteRef.shape`), in the type of A."""
        if self.kind == "conv":
            flat = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
            return flat.reshape(self.lora_B.shape[0], *self.lora_A.shape[1:]) * self.scaling
        delta = self.lora_B @ self.lora_A * self.scaling
        return delta.T if self.kind in ("embedding", "table") else delta

    def extra_repr(self) -> str:
        return f"{self.kind}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"
