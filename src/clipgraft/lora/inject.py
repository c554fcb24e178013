"""Attach low-rank updates to a model and take them off again: the only file that changes a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipgraft.errors import AdapterError, ConfigError, TrainingError
from clipgraft.lora.attention import graft_attention, ungraft_attention
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.parameters import (
    graft_projection,
    graft_table,
    ungraft_projection,
    ungraft_table,
)
from clipgraft.lora.targets import override_values, select_sites
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import is_lora, submodule
from clipgraft.models.sites import Site, SiteRef

_STATE = "_clipgraft_lora"


@dataclass(frozen=True)
class LoraSettings:
    """What `apply_lora` was asked for, as adapter files record it."""

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: str = "text-attention"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    train_logit_scale: bool = False


@dataclass
class LoraState:
    """The updates attached to a model, kept on the model itself.

    Attributes:
        settings: what was asked for.
        layers: the updates by site.
        trainable: names of the base weights that wanted gradients before.
        base_scale: the base's log temperature.
        adapter_scale: the adapter's, put aside while the adapter is disabled.
        hooks: what `remove_lora` takes off.
    """

    settings: LoraSettings
    layers: dict[Site, LoraLayer]
    trainable: frozenset[str]
    base_scale: Tensor
    adapter_scale: Tensor | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)


def apply_lora(
    model: ClipLike,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Iterable[str] = "text-attention",
    *,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    train_logit_scale: bool = False,
) -> int:
    """Freeze the base and attach zero-effect LoRA to the chosen sites, in place.

    Args:
        model: a `Clip`, or a raw open_clip or transformers model.
        r: rank of every update.
        alpha: scale numerator; None means r, a scale of 1.
        dropout: probability on the adapter path, in training mode only.
        targets: a target set or expression (`clipgraft.lora.targets`).
        use_rslora: scale by α/√r instead of α/r.
        rank_pattern: other ranks for some sites, `{"text.0.*": 4}`.
        alpha_pattern: other alphas for some sites.
        train_logit_scale: leave the temperature trainable too.

    Returns:
        How many sites were adapted.

    Raises:
        ConfigError: a rank, alpha or dropout out of range.
        TargetError: targets or a pattern match nothing.
        AdapterError: the model already carries LoRA.
    """
    expression = targets if isinstance(targets, str) else ",".join(targets)
    settings = LoraSettings(
        r=r,
        alpha=r if alpha is None else alpha,
        dropout=dropout,
        targets=expression,
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        train_logit_scale=train_logit_scale,
    )
    return len(attach(as_clip(model), settings))


def attach(clip: Clip, settings: LoraSettings) -> dict[Site, LoraLayer]:
    """`apply_lora` from settings; returns the layers by site."""
    if lora_state(clip.model) is not None:
        raise AdapterError(
            "this model already carries LoRA: call remove_lora(model) before applying it again"
        )
    refs = clip.site_refs
    chosen = select_sites(list(refs), settings.targets)
    ranks = override_values(list(refs), chosen, settings.rank_pattern)
    alphas = override_values(list(refs), chosen, settings.alpha_pattern)
    check_settings(settings, ranks.values(), alphas.values())
    _ = clip.fingerprint  # taken while the weights are certainly the base's
    state = _freeze(clip, settings)
    for site in chosen:
        layer = LoraLayer(
            refs[site],
            ranks.get(site, settings.r),
            alphas.get(site, settings.alpha),
            settings.dropout,
            settings.use_rslora,
        ).to(clip.device)
        _graft(clip.model, refs[site], layer, state.hooks)
        state.layers[site] = layer.train(clip.model.training)
    object.__setattr__(clip.model, _STATE, state)
    return state.layers


def _freeze(clip: Clip, settings: LoraSettings) -> LoraState:
    """Let no base weight train, and remember which did.

    All attention modules are grafted, not only those with an update: torch chooses their kernels by whether
    weights want gradients, so that freezing alone would change the last bits of what they compute.
    """
    trainable = frozenset(name for name, p in clip.model.named_parameters() if p.requires_grad)
    state = LoraState(settings, {}, trainable, clip.logit_scale.detach().clone())
    hosts = {submodule(clip.model, ref.module) for ref in clip.site_refs.values() if ref.kind == "fused"}
    for host in hosts:
        graft_attention(host)
    clip.model.requires_grad_(False)
    clip.model.zero_grad(set_to_none=True)
    clip.logit_scale.requires_grad_(settings.train_logit_scale)
    return state


def check_settings(settings: LoraSettings, ranks: Iterable[int], alphas: Iterable[float]) -> None:
    """Raise ConfigError, with all faults at once, if a rank, alpha or dropout is out of range."""
    faults = [f"r must be a whole number from 1 up, got {r}" for r in (settings.r, *ranks) if not _is_rank(r)]
    faults += [
        f"alpha must be a positive number, got {alpha:g}"
        for alpha in (settings.alpha, *alphas)
        if not 0 < alpha < math.inf
    ]
    if not 0 <= settings.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {settings.dropout:g}")
    if faults:
        raise ConfigError("LoRA: " + "; ".join(dict.fromkeys(faults)))


def _is_rank(r: object) -> bool:
    return isinstance(r, int) and not isinstance(r, bool) and r >= 1


def _graft(model: nn.Module, ref: SiteRef, layer: LoraLayer, hooks: list[RemovableHandle]) -> None:
    host = submodule(model, ref.module)
    if ref.kind == "fused":
        setattr(host, f"lora_{ref.site.role}", layer)
    elif ref.kind == "projection":
        graft_projection(host, ref.parameter, layer)
    elif ref.kind == "table":
        graft_table(host, ref.parameter, layer)
    else:
        host.lora = layer
        hooks.append(host.register_forward_hook(_add_update))


def _add_update(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    layer = host.lora
    assert isinstance(layer, LoraLayer)
    return output + layer(args[0], host).to(output.dtype) if layer.enabled else output


def remove_lora(model: ClipLike) -> None:
    """Take every update off again: the model is the untouched base, and trains what it trained before."""
    clip = as_clip(model)
    state = require_lora(clip.model)
    for hook in state.hooks:
        hook.remove()
    for site, ref in reversed(clip.site_refs.items()):
        _ungraft(clip.model, ref, site in state.layers)
    if state.settings.train_logit_scale:
        clip.logit_scale.data = state.base_scale
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    delattr(clip.model, _STATE)


def _ungraft(model: nn.Module, ref: SiteRef, adapted: bool) -> None:
    host = submodule(model, ref.module)
    if ref.kind == "fused":
        ungraft_attention(host)
    if not adapted:
        return
    if ref.kind == "fused":
        delattr(host, f"lora_{ref.site.role}")
    elif ref.kind == "projection":
        ungraft_projection(host, ref.parameter)
    elif ref.kind == "table":
        ungraft_table(host, ref.parameter)
    else:
        del host.lora


def lora_state(model: ClipLike) -> LoraState | None:
    """The updates a model carries, or None."""
    state = getattr(model.model if isinstance(model, Clip) else model, _STATE, None)
    return state if isinstance(state, LoraState) else None


def require_lora(model: ClipLike) -> LoraState:
    """The updates a model carries; raises AdapterError if it carries none."""
    state = lora_state(model)
    if state is None:
        raise AdapterError("this model carries no LoRA: call apply_lora or load_adapter first")
    return state


def enable_lora(model: ClipLike) -> None:
    """Let the updates act again."""
    state = require_lora(model)
    for layer in state.layers.values():
        layer.enabled = True
    if state.adapter_scale is not None:
        as_clip(model).logit_scale.data, state.adapter_scale = state.adapter_scale, None


def disable_lora(model: ClipLike) -> None:
    """Make the model behave as its base, to the bit, its temperature too; the updates stay attached."""
    state = require_lora(model)
    for layer in state.layers.values():
        layer.enabled = False
    if state.settings.train_logit_scale and state.adapter_scale is None:
        scale = as_clip(model).logit_scale
        state.adapter_scale, scale.data = scale.data, state.base_scale.clone()


@contextlib.contextmanager
def lora_disabled(model: ClipLike) -> Iterator[None]:
    """`with lora_disabled(model): ...` runs the base; what was enabled before is enabled after."""
    state = require_lora(model)
    before = [layer.enabled for layer in state.layers.values()]
    scale_was_active = state.adapter_scale is None
    disable_lora(model)
    try:
        yield
    finally:
        if scale_was_active:
            enable_lora(model)
        for layer, enabled in zip(state.layers.values(), before, strict=True):
            layer.enabled = enabled


def adapter_logit_scale(model: ClipLike) -> float | None:
    """The log temperature that belongs to the adapter, whether enabled or not; None if it trains none."""
    state = require_lora(model)
    if not state.settings.train_logit_scale:
        return None
    scale = as_clip(model).logit_scale.detach() if state.adapter_scale is None else state.adapter_scale
    return float(scale)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights: of the model with its adapters, of those that train, of the adapters."""

    total: int
    trainable: int
    lora: int


def count_parameters(model: ClipLike) -> ParameterCount:
    """Count weights, each shared one once."""
    named = list(as_clip(model).model.named_parameters())
    return ParameterCount(
        total=sum(p.numel() for _, p in named),
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
        lora=sum(p.numel() for name, p in named if is_lora(name)),
    )


def verify_gradients(model: ClipLike) -> int:
    """After a backward pass: every weight that is to train has a gradient and no other one has.

    With LoRA attached, what is to train is the adapter, and the temperature if that was asked for; without,
    whatever requires gradients.

    Returns:
        How many weights have a gradient.

    Raises:
        TrainingError: naming the first weights that break the rule.
    """
    clip = as_clip(model)
    named = list(clip.model.named_parameters())
    state, scale = lora_state(clip), clip.logit_scale
    if state is None:
        wanted = {name for name, p in named if p.requires_grad}
    else:
        trains_scale = state.settings.train_logit_scale
        wanted = {name for name, p in named if is_lora(name) or (trains_scale and p is scale)}
    leaked = [name for name, p in named if name not in wanted and (p.requires_grad or p.grad is not None)]
    missing = [name for name, p in named if name in wanted and p.grad is None]
    if leaked:
        raise TrainingError(
            f"{len(leaked)} weights of the base are not frozen or have gradients, {_some(leaked)}: "
            "call requires_grad_(False) on them before the backward pass"
        )
    if missing:
        raise TrainingError(
            f"{len(missing)} trainable weights got no gradient, {_some(missing)}: "
            "their output is not part of the loss, or LoRA is disabled (enable_lora)"
        )
    return len(wanted)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
