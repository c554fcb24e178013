"""Attention with low-rank updates on q, k, v inside the fused in_proj and on out_proj as it is really used.

open_clip 3.x blocks hold `nn.MultiheadAttention`, which reads `out_proj.weight` without calling the module;
4.x blocks hold open_clip's own `Attention`. Each function below follows its module's arithmetic step by step
so that an adapter whose update is zero changes no bit.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.lora.layers import LoraLayer

FUSED_ROLES = ("q", "k", "v", "out")


def active_lora(attention: nn.Module) -> dict[str, LoraLayer]:
    """The enabled updates of an attention module by role."""
    layers = {role: getattr(attention, f"lora_{role}", None) for role in FUSED_ROLES}
    return {role: layer for role, layer in layers.items() if isinstance(layer, LoraLayer) and layer.enabled}


def multihead_forward(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Replaces `nn.MultiheadAttention.forward` on a module that carries updates.

    (N, L, dim) for batch_first modules, else (L, N, dim); the mask is (L, L) or (N·heads, L, L), additive
    or boolean, as there.
    """
    lora = active_lora(attention)
    stock = type(attention).forward
    arguments = (
        query,
        key,
        value,
        key_padding_mask,
        need_weights,
        attn_mask,
        average_attn_weights,
        is_causal,
    )
    if not lora:
        return stock(attention, *arguments)
    if need_weights or key_padding_mask is not None or key is not query or value is not query:
        return _with_folded_weights(attention, lora, arguments)
    if _stock_takes_fast_path(attention):
        return _with_folded_weights(attention, lora, arguments)
    x = query.transpose(0, 1) if attention.batch_first else query
    length, batch, dim = x.shape
    heads, head_dim = attention.num_heads, dim // attention.num_heads
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    parts = projected.view(length, batch, 3, dim).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = _add_lora(lora, x, parts.unbind())
    q, k, v = (t.view(length, batch * heads, head_dim).transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.view(batch, heads, length, head_dim) for t in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    mask = _additive_mask(attn_mask, q, batch, heads)
    context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    context = context.permute(2, 0, 1, 3).contiguous().view(length * batch, dim)
    out = F.linear(context, attention.out_proj.weight, attention.out_proj.bias)
    if "out" in lora:
        out = out + lora["out"](context).to(out.dtype)
    out = out.view(length, batch, dim)
    return (out.transpose(0, 1) if attention.batch_first else out), None


def fused_forward(
    attention: nn.Module,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Replaces the forward of open_clip's own `Attention` for self-attention on (N, L, dim)."""
    lora = active_lora(attention)
    same = (k_x is None or k_x is x) and (v_x is None or v_x is x)
    if not lora:
        extra = {name: t for name, t in (("k_x", k_x), ("v_x", v_x)) if t is not None}
        result: Tensor = type(attention).forward(attention, x, **extra, attn_mask=attn_mask)
        return result
    if not same:
        raise NotImplementedError(
            "LoRA on cross-attention: clipgraft adapts the self-attention of CLIP towers"
        )
    batch, length, dim = x.shape
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # type: ignore[arg-type]
    q, k, v = _add_lora(lora, x, projected.chunk(3, dim=-1))
    q, k, v = (t.reshape(batch, length, heads, -1).transpose(1, 2) for t in (q, k, v))
    context = _open_clip_attention(attention, q, k, v, _additive_mask(attn_mask, q, batch, heads))
    head_scale = getattr(attention, "head_scale", None)
    if head_scale is not None:
        context = context * head_scale
    context = attention.ln_inner(context.transpose(1, 2).reshape(batch, length, dim))  # type: ignore[operator]
    out: Tensor = attention.out_proj(context)  # type: ignore[operator]
    if "out" in lora:
        out = out + lora["out"](context).to(out.dtype)
    dropped: Tensor = attention.out_drop(out)  # type: ignore[operator]
    return dropped


def _open_clip_attention(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Scaled-dot-product or Swin-V2 cosine attention on (N, heads, L, head_dim)."""
    drop, scale = attention.attn_drop, getattr(attention, "logit_scale", None)
    assert isinstance(drop, nn.Dropout)
    if scale is None:
        q, k = attention.ln_q(q), attention.ln_k(k)  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, mask, drop.p if attention.training else 0.0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    scores = scores * scale.clamp(max=float(attention.logit_scale_max)).exp()  # type: ignore[arg-type]
    if mask is not None:
        scores = scores + mask
    context: Tensor = drop(scores.softmax(dim=-1)) @ v
    return context


def _add_lora(
    lora: dict[str, LoraLayer], x: Tensor, parts: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        part + lora[role](x).to(part.dtype) if role in lora else part
        for role, part in zip("qkv", parts, strict=True)
    )
    return q, k, v


def _additive_mask(mask: Tensor | None, q: Tensor, batch: int, heads: int) -> Tensor | None:
    """Masks of (L, L) or (N·heads, L, L), additive or True-is-hidden, in the shape and type SDPA takes."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q.dtype)
    return mask.view(batch, heads, *mask.shape[-2:]) if mask.ndim == 3 else mask


def _stock_takes_fast_path(attention: nn.MultiheadAttention) -> bool:
    """In eval mode without gradients torch may run its fused kernel, which rounds unlike the slow path.

    Only for fp32: folding a small update into bf16 weights would round much of it away.
    """
    plain = not attention.training and not torch.is_grad_enabled() and not torch.is_autocast_enabled()
    return plain and attention.in_proj_weight.dtype == torch.float32


def _with_folded_weights(
    attention: nn.MultiheadAttention,
    lora: dict[str, LoraLayer],
    arguments: tuple[object, ...],
) -> tuple[Tensor, Tensor | None]:
    """The stock forward on W + ΔW made for this call alone; nothing is written back."""
    dim = attention.embed_dim
    in_proj, out_proj = attention.in_proj_weight, attention.out_proj.weight
    rows = [
        part + lora[role].delta_weight().to(part.dtype) if role in lora else part
        for role, part in zip("qkv", torch.split(in_proj, dim), strict=True)
    ]
    folded = _copy_with(attention, in_proj_weight=torch.cat(rows))
    if "out" in lora:
        delta = lora["out"].delta_weight().to(out_proj.dtype)
        projection = _copy_with(attention.out_proj, weight=out_proj + delta)
        folded.__dict__["_modules"] = {**attention._modules, "out_proj": projection}
    return type(attention).forward(folded, *arguments)  # type: ignore[arg-type]


_M = TypeVar("_M", bound=nn.Module)


def _copy_with(module: _M, **weights: Tensor) -> _M:
    """A shallow copy that shares everything with `module` but the named weights."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {**module._parameters, **weights}
    return twin
