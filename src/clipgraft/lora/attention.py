"""Attention with low-rank updates on q, k, v inside the fused in_proj and on out_proj as it is really used.

open_clip 3.x blocks hold `nn.MultiheadAttention`, which reads `out_proj.weight` without calling the module;
4.x blocks hold open_clip's own `Attention`. Each function below follows its module's arithmetic step by step
so that an adapter whose update is zero changes no bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.lora.layers import AdapterSlot, LoraLayer
from clipgraft.models.sites import ATTENTION_ROLES, Site

_QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]
_WAS_TRAINABLE = "_clipgraft_was_trainable"


def graft_attention(attention: nn.Module) -> None:
    """Replace an attention module's forward by one with updates; call it before the base is frozen."""
    multihead = isinstance(attention, nn.MultiheadAttention)
    forward: Callable[..., Any] = multihead_forward if multihead else fused_forward
    # A partial, unlike a bound method, can be pickled and read back.
    attention.forward = partial(forward, attention)
    weight = attention.in_proj_weight
    setattr(attention, _WAS_TRAINABLE, isinstance(weight, Tensor) and weight.requires_grad)


def ungraft_attention(attention: nn.Module) -> None:
    """Give an attention module its own forward back."""
    for name in ("forward", _WAS_TRAINABLE):
        attention.__dict__.pop(name, None)


def _was_trainable(attention: nn.Module) -> bool:
    return bool(getattr(attention, _WAS_TRAINABLE, False))


def _rounds_as_trainable(attention: nn.MultiheadAttention) -> bool:
    """Whether torch would treat the base's in_proj as a weight that wants gradients, had LoRA not frozen it.

    torch multiplies a (L, N, dim) view by such a weight as one matrix, and by a frozen one as L small ones,
    which rounds differently, even where no gradient is taken. What autocast makes of a weight without
    gradients counts as frozen.
    """
    if not _was_trainable(attention):
        return False
    device = attention.in_proj_weight.device
    cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.is_grad_enabled() or not cast


def slot_name(site: Site) -> str:
    """What an attention module calls the slot of a site, in a block or in the pooling head."""
    return f"lora_{site.role.removeprefix('pool_')}"


def _active_lora(attention: nn.Module) -> dict[str, LoraLayer]:
    """Return the updates in effect of an attention module, by role of a block."""
    slots = {role: getattr(attention, f"lora_{role}", None) for role in ATTENTION_ROLES}
    layers = {role: slot.current for role, slot in slots.items() if isinstance(slot, AdapterSlot)}
    return {role: layer for role, layer in layers.items() if layer is not None}


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
    """Replaces `nn.MultiheadAttention.forward` in a model that carries updates.

    (N, L, dim) for batch_first modules, else (L, N, dim); the mask is (L, L) or (N·heads, L, L), additive
    or boolean, as there. Cross-attention and calls with `need_weights`, `key_padding_mask` or `is_causal`
    run the stock forward on W': exact too, but without dropout on the adapter path.
    """
    lora = _active_lora(attention)
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
    unusual = need_weights or key_padding_mask is not None or is_causal or query.ndim != 3
    unusual = unusual or key is not query or value is not query
    unusual = unusual or attention.bias_k is not None or attention.add_zero_attn
    if unusual or _stock_rounds_alike(attention, lora):
        return _with_folded_weights(attention, lora, arguments)
    return _self_attention(attention, lora, query, attn_mask), None


def _self_attention(
    attention: nn.MultiheadAttention, lora: dict[str, LoraLayer], query: Tensor, attn_mask: Tensor | None
) -> Tensor:
    """torch's slow path, step by step, with the updates beside it."""
    x = query.transpose(0, 1) if attention.batch_first else query
    length, batch, dim = x.shape
    heads, head_dim = attention.num_heads, dim // attention.num_heads
    projected = _project_in(attention, x)
    parts = projected.view(length, batch, 3, dim).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = _adapt(attention, lora, (x, x, x), (parts[0], parts[1], parts[2]))
    q, k, v = (t.view(length, batch * heads, head_dim).transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.view(batch, heads, length, head_dim) for t in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    mask = _additive_mask(attn_mask, q, batch, heads)
    context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    context = context.permute(2, 0, 1, 3).contiguous().view(length * batch, dim)
    weight, bias = attention.out_proj.weight, attention.out_proj.bias
    out = F.linear(context, weight, bias)
    if "out" in lora:
        out = lora["out"].adapt(out, context, weight, bias)
    out = out.view(length, batch, dim)
    return out.transpose(0, 1) if attention.batch_first else out


def _project_in(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """q, k and v of (L, N, dim) in one product, rounded as by the base before it was frozen."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if x.is_contiguous() or not _rounds_as_trainable(attention):
        return F.linear(x, weight, bias)
    projected = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return projected if bias is None else projected + bias.to(projected.dtype)


def fused_forward(
    attention: nn.Module,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Replaces the forward of open_clip's own `Attention`, (N, L, dim) -> (N, L, dim).

    `k_x` and `v_x` are 4.x's; its blocks pass them even where they are `x` itself.
    """
    lora = _active_lora(attention)
    if not lora:
        extra = {name: t for name, t in (("k_x", k_x), ("v_x", v_x)) if t is not None}
        result: Tensor = type(attention).forward(attention, x, **extra, attn_mask=attn_mask)
        return result
    inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
    parts = _project_separately(attention, inputs, fused=k_x is None and v_x is None)
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    q, k, v = _adapt(attention, lora, inputs, parts)
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    # As SDPA does, 4.x reads True as "attend"; 3.x, as MultiheadAttention does, as "hide".
    if attn_mask is not None and attn_mask.dtype == torch.bool and hasattr(attention, "use_sdpa"):
        attn_mask = ~attn_mask
    context = _open_clip_attention(attention, q, k, v, _additive_mask(attn_mask, q, len(x), heads))
    head_scale = getattr(attention, "head_scale", None)
    if head_scale is not None:
        context = context * head_scale
    context = attention.ln_inner(context.transpose(1, 2).flatten(2))  # type: ignore[operator]
    projection = attention.out_proj
    assert isinstance(projection, nn.Linear)
    out: Tensor = projection(context)
    if "out" in lora:
        out = lora["out"].adapt(out, context, projection.weight, projection.bias)
    dropped: Tensor = attention.out_drop(out)  # type: ignore[operator]
    return dropped


def _project_separately(attention: nn.Module, inputs: _QKV, fused: bool) -> _QKV:
    """q, k and v of open_clip's `Attention`: one product for plain calls, three where k or v is given."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    assert isinstance(weight, Tensor)
    if fused:
        q, k, v = F.linear(inputs[0], weight, bias).chunk(3, dim=-1)  # type: ignore[arg-type]
        return q, k, v
    biases = bias.chunk(3) if isinstance(bias, Tensor) else (None, None, None)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True))
    return q, k, v


def _open_clip_attention(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Scaled-dot-product or Swin-V2 cosine attention on (N, heads, L, head_dim)."""
    drop, scale = attention.attn_drop, getattr(attention, "logit_scale", None)
    assert isinstance(drop, nn.Dropout)
    if scale is None:
        q, k = attention.ln_q(q), attention.ln_k(k)  # type: ignore[operator]
        if getattr(attention, "use_sdpa", True):
            return F.scaled_dot_product_attention(q, k, v, mask, drop.p if attention.training else 0.0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = scores * scale.clamp(max=float(attention.logit_scale_max)).exp()  # type: ignore[arg-type]
    if mask is not None:
        scores = scores + mask
    context: Tensor = drop(scores.softmax(dim=-1)) @ v
    return context


def _adapt(attention: nn.Module, lora: dict[str, LoraLayer], inputs: _QKV, parts: _QKV) -> _QKV:
    """q, k and v with their updates."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    assert isinstance(weight, Tensor)
    biases = bias.chunk(3) if isinstance(bias, Tensor) else (None, None, None)
    q, k, v = (
        lora[role].adapt(part, x, rows, offset) if role in lora else part
        for role, x, part, rows, offset in zip("qkv", inputs, parts, weight.chunk(3), biases, strict=True)
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


def _stock_rounds_alike(attention: nn.MultiheadAttention, lora: dict[str, LoraLayer]) -> bool:
    """Whether the stock forward on W' is the exact way: it alone reaches torch's fused kernel.

    That kernel runs in eval mode without gradients and rounds unlike the slow path. Updates that are not
    zero are folded into fp32 weights only: bf16 would round much of a small update away.
    """
    if torch.is_grad_enabled():
        return not lora and not _was_trainable(attention)
    if not lora:
        return True
    if attention.training:
        return False
    if attention.in_proj_weight.dtype == torch.float32:
        return True
    return all(layer.is_zero for layer in lora.values())


def _with_folded_weights(
    attention: nn.MultiheadAttention,
    lora: dict[str, LoraLayer],
    arguments: tuple[object, ...],
) -> tuple[Tensor, Tensor | None]:
    """Run the stock forward on W' made for this call alone; nothing is written back."""
    stock = type(attention).forward
    relabel = _rounds_as_trainable(attention) and not torch.is_grad_enabled()
    if not lora and not relabel:
        return stock(attention, *arguments)  # type: ignore[arg-type]
    if relabel:
        # Tensors made in inference mode cannot be told to want gradients.
        with torch.inference_mode(False), torch.no_grad():
            weights = {"in_proj_weight": _folded_in_proj(attention, lora).detach().requires_grad_()}
    elif attention.in_proj_weight is None:
        weights = _folded_apart(attention, lora)
    else:
        weights = {"in_proj_weight": _folded_in_proj(attention, lora)}
    folded = _copy_with(attention, **weights, in_proj_bias=_folded_bias(attention, lora))
    if "out" in lora:
        layer, out = lora["out"], attention.out_proj
        bias = _moved_bias(out.bias, layer)
        projection = _copy_with(out, weight=layer.folded(out.weight), bias=bias)
        folded.__dict__["_modules"] = {**attention._modules, "out_proj": projection}
    return stock(folded, *arguments)  # type: ignore[arg-type]


def _folded_in_proj(attention: nn.MultiheadAttention, lora: dict[str, LoraLayer]) -> Tensor:
    weight = attention.in_proj_weight
    if not any(role in lora for role in "qkv"):
        return weight
    parts = zip("qkv", torch.split(weight, attention.embed_dim), strict=True)
    return torch.cat([lora[role].folded(p) if role in lora else p for role, p in parts])


def _folded_apart(attention: nn.MultiheadAttention, lora: dict[str, LoraLayer]) -> dict[str, Tensor]:
    """Return the three weights of an attention whose keys have another width than its queries."""
    weights = {role: getattr(attention, f"{role}_proj_weight") for role in "qkv"}
    return {
        f"{role}_proj_weight": lora[role].folded(weight) if role in lora else weight
        for role, weight in weights.items()
    }


def _folded_bias(attention: nn.MultiheadAttention, lora: dict[str, LoraLayer]) -> Tensor | None:
    bias = attention.in_proj_bias
    if bias is None or all(role not in lora or lora[role].lora_bias is None for role in "qkv"):
        return bias
    parts = zip("qkv", bias.chunk(3), strict=True)
    return torch.cat([p if role not in lora else _moved_bias(p, lora[role]) for role, p in parts])


def _moved_bias(bias: Tensor, layer: LoraLayer) -> Tensor:
    return bias if layer.lora_bias is None else bias + layer.lora_bias.to(bias.dtype)


_M = TypeVar("_M", bound=nn.Module)


def _copy_with(module: _M, **weights: Tensor | None) -> _M:
    """Copy a module shallowly, with other tensors for the named weights."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {**module._parameters, **weights}
    return twin
