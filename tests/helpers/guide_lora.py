"""The guide's LoRA for open_clip's text tower, written independently from its description of the layer.

A block has `lora_q`, `lora_k`, `lora_v` and `lora_out`, each Δ(x) = (α/r)·B·A·x; the first three are added to
the projections of the normalised input, the last to the output projection of what attention gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.adapters.adapter_file import AdapterFile
from explicit_lora import Update


class GuideLayer(nn.Module):
    """Δ(x) = (α/r)·B·A·x; B starts at zero."""

    def __init__(self, dim: int, r: int, alpha: float) -> None:
        super().__init__()
        self.scaling = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, dim))
        self.lora_B = nn.Parameter(torch.zeros(dim, r))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x @ self.lora_A.T @ self.lora_B.T * self.scaling


class GuideAttention:
    """Compute the attention of one block with its LoRA layers, for (N, L, dim) inputs."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, q_x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        attention, added = self.block.attn, dict(self.block.named_children())
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        parts = []
        for letter, weight, bias in zip("qkv", weights, biases, strict=True):
            part = F.linear(q_x, weight, bias)
            if f"lora_{letter}" in added:
                part = part + added[f"lora_{letter}"](q_x)
            parts.append(part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
        q, k, v = parts
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores + attn_mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
        return out + added["lora_out"](mixed) if "lora_out" in added else out


def apply_guide(model: nn.Module, r: int, alpha: float, target_modules: Sequence[str]) -> int:
    """The guide's `apply_lora_to_text_encoder`; returns how many blocks carry LoRA."""
    letters = ["q", "k", "v"] * ("in_proj" in target_modules) + ["out"] * ("out_proj" in target_modules)
    for block in model.transformer.resblocks:
        for letter in letters:
            setattr(block, f"lora_{letter}", GuideLayer(block.attn.embed_dim, r, alpha))
        block.attention = GuideAttention(block)
    return len(model.transformer.resblocks)


def updates_of(adapter: AdapterFile) -> dict[str, Update]:
    """Turn an adapter file into updates for `explicit_model`: A, B and the scale of every site."""
    settings, updates = adapter.settings, {}
    for site, (a, b) in adapter.weights.items():
        alpha = settings.alpha_pattern.get(str(site), settings.alpha)
        r = settings.rank_pattern.get(str(site), settings.r)
        assert a.shape[0] == b.shape[1] == r
        updates[str(site)] = (a, b, alpha / (r**0.5 if settings.use_rslora else r))
    return updates


def deltas(adapter: AdapterFile) -> dict[str, Tensor]:
    """Compute s·B·A of every linear site in fp64."""
    return {site: scale * (b.double() @ a.double()) for site, (a, b, scale) in updates_of(adapter).items()}
