"""Attach adapters to a model and remove them; no other file changes a model's modules."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.lora.attention import graft_attention, slot_name, ungraft_attention
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.control import make_active, restore_base
from clipgraft.lora.coverage import uncovered
from clipgraft.lora.initialization import initialize_from_base
from clipgraft.lora.layers import AdapterSlot, BiasLayer, LoraLayer, Parts
from clipgraft.lora.parameters import graft_projection, graft_read, ungraft_projection, ungraft_read
from clipgraft.lora.rows import graft_rows, ungraft_rows
from clipgraft.lora.state import (
    DEFAULT,
    STATE,
    Adapter,
    LoraState,
    check_name,
    lora_state,
    require_lora,
    require_unmerged,
)
from clipgraft.lora.targets import override_values, select_sites
from clipgraft.lora.variants import PlainLora, check_variant, variant_of
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import is_pure_norm, site_bias, site_weight
from clipgraft.models.lone_tower import lone_tower
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import POOL_ROLES, SiteRef

log = logging.getLogger("clipgraft")
_MOST_OVER = 4


def apply_lora(
    model: ClipLike, config: LoraConfig | None = None, *, name: str = DEFAULT, **options: Any
) -> int:
    """Freeze the base and attach a new adapter to the chosen sites, in place; it is the active one.

    `apply_lora(clip, r=16, targets="linear-text")` is short for
    `apply_lora(clip, LoraConfig(r=16, targets="linear-text"))`.

    Args:
        model: a `Clip`, or a raw open_clip or transformers model.
        config: the options of the adapter.
        name: of the adapter, beside others that the model may carry.
        options: fields of `LoraConfig`, in place of `config` or to change it.

    Returns:
        How many sites were adapted.

    Raises:
        ConfigError: an option out of range, or one that the variant does not have.
        TargetError: targets or a pattern match nothing.
        AdapterError: the model already carries an adapter of that name, or others are merged into it.
    """
    config = LoraConfig(**options) if config is None else config.replace(**options)
    clip = as_clip(model)
    if config.train_logit_scale and lone_tower(clip.model) is not None:
        raise ConfigError("LoRA: `train_logit_scale` given, but a tower alone has no temperature: drop it")
    _check_ranks(clip, config)
    for line in uncovered(clip, config.targets):
        log.warning("%s", line)
    for line in _compromises(clip, config):
        log.warning("%s", line)
    adapter = attach(clip, config, name)
    return sum(layer.r > 0 for layer in adapter.layers.values())


def _compromises(clip: Clip, settings: LoraConfig) -> list[str]:
    """What of the settings does not hold at some of the sites, a line each."""
    refs, lines = clip.site_refs, []
    undropped = [
        site
        for site in select_sites(list(refs), settings.targets)
        if refs[site].kind == "read" or (refs[site].kind == "fused" and site.role in POOL_ROLES)
    ]
    if settings.dropout and undropped:
        lines.append(
            f"dropout={settings.dropout:g} does not act at {len(undropped)} sites, {undropped[0]} and so on: "
            "their module reads the weight, so that the update has no path of its own"
        )
    others = [m for m in clip.model.modules() if isinstance(m, nn.LayerNorm) and not is_pure_norm(m)]
    if settings.bias == "all" and others:
        lines.append(
            f"bias='all' leaves out {len(others)} norms that end in an activation, which no hook gets between"
        )
    return lines


def _check_ranks(clip: Clip, settings: LoraConfig) -> None:
    """Refuse ranks far above what a site's weight can have, which fill the memory and gain nothing.

    A little above is wasteful and no slip: tiny models are tried with the usual rank.
    """
    refs = clip.site_refs
    chosen = select_sites(list(refs), settings.targets)
    ranks = override_values(list(refs), chosen, settings.rank_pattern)
    for site in chosen:
        shape = refs[site].shape
        rank, full = ranks.get(site, settings.r), min(shape[0], math.prod(shape[1:]))
        if isinstance(rank, int) and rank > _MOST_OVER * full:
            raise ConfigError(
                f"LoRA: r={rank} at {site}, whose weight is {'x'.join(map(str, shape))}: a rank "
                f"above {full} gains nothing there; choose {full} or less"
            )


def attach(
    clip: Clip, settings: LoraConfig, name: str = DEFAULT, *, activate: bool = True, replace: bool = False
) -> Adapter:
    """`apply_lora` from settings; returns the new adapter.

    Args:
        clip: the model.
        settings: of the adapter.
        name: of the adapter.
        activate: make it the active one, which it also is where it replaces the active one.
        replace: let it take the place of an older one of that name at once.
    """
    with rwlock_of(clip.model).preparing():
        _check_free(clip, name, replace)
        adapter = build(clip, settings)
        hang(clip, adapter, name, activate=activate, replace=replace)
        return adapter


def _check_free(clip: Clip, name: str, replace: bool) -> None:
    check_name(name)
    require_unmerged(clip, "add an adapter")
    state = lora_state(clip)
    if state is not None and name in state.adapters and not replace:
        raise AdapterError(
            f"this model already carries LoRA named {name!r}: call remove_lora(model) before applying it "
            "again, or give another name"
        )


def hang(clip: Clip, adapter: Adapter, name: str, *, activate: bool = True, replace: bool = False) -> None:
    """Attach an adapter that `build` made for this model; arguments and errors as for `attach`."""
    with rwlock_of(clip.model).preparing():
        _check_free(clip, name, replace)
        with rwlock_of(clip.model).write():
            state = _state_of(clip)
            active = name if activate else state.active
            _take_off(clip, state, {name})
            adapter.prepared = None  # it may train from now on
            _hang(clip, state, name, adapter)
            state.enabled = state.enabled or activate
            make_active(clip, state, active)


def _state_of(clip: Clip) -> LoraState:
    """The adapters of a model, which is frozen for its first; the caller holds the model's lock alone."""
    state = lora_state(clip)
    if state is None:
        _ = clip.fingerprint  # taken while the weights are certainly the base's
        state = _freeze(clip)
    return state


@contextlib.contextmanager
def hung(clip: Clip, adapters: Sequence[Adapter]) -> Iterator[tuple[str, ...]]:
    """Attach adapters inside `with`, and yield their names; none of them is active by that.

    Those that the model carries already keep their names and stay; the others go at the end, and a model that
    carried none is the base again. The caller holds the model's lock alone.
    """
    state = _state_of(clip)
    known = {id(adapter): name for name, adapter in state.adapters.items()}
    # No name that `check_name` allows.
    names = tuple(known.get(id(adapter), f"{number} for now") for number, adapter in enumerate(adapters))
    guests = {name: a for name, a in zip(names, adapters, strict=True) if id(a) not in known}
    try:
        for name, adapter in guests.items():
            _hang(clip, state, name, adapter)
        yield names
    finally:
        _take_off(clip, state, set(guests))
        if not state.adapters:
            _ungraft_all(clip, state)


def build(clip: Clip, settings: LoraConfig, shared: Parts | None = None) -> Adapter:
    """Make a new adapter for a model without attaching it; nothing of the model changes.

    Args:
        clip: the model.
        settings: of the adapter.
        shared: stored tensors that all its sites share; by default they are made anew.
    """
    with rwlock_of(clip.model).read():
        return _build(clip, settings, shared or {})


def _build(clip: Clip, settings: LoraConfig, shared: Parts) -> Adapter:
    """Build the updates of the chosen sites; the model is not changed."""
    refs = clip.site_refs
    chosen = select_sites(list(refs), settings.targets)
    ranks = override_values(list(refs), chosen, settings.rank_pattern)
    alphas = override_values(list(refs), chosen, settings.alpha_pattern)
    adapted = [refs[site] for site in chosen]
    check_variant(settings, adapted)
    variant = variant_of(settings)
    adapter = Adapter(settings, shared=variant.make_shared(settings, adapted, shared))
    for site, ref in refs.items():
        bias = settings.bias != "none" and site_bias(clip.model, ref) is not None
        layer: LoraLayer
        if site in chosen:
            r, alpha = ranks.get(site, settings.r), alphas.get(site, settings.alpha)
            layer = variant(ref, r, alpha, settings, bias=bias, shared=adapter.shared)
        elif settings.bias == "all" and bias:
            layer = PlainLora(ref, 0, 1.0, bias=True)
        else:
            continue
        adapter.layers[site] = layer.to(clip.device)
        if settings.init == "pissa" and layer.r:
            initialize_from_base(layer, site_weight(clip.model, ref))
        layer.reset(site_weight(clip.model, ref))
    if settings.bias == "all":
        norms = clip.family.norms(clip.model)
        sizes = {path: norm.bias.numel() for path, norm in norms.items() if norm.bias is not None}
        adapter.norms = {path: BiasLayer(size).to(clip.device) for path, size in sizes.items()}
    return adapter


def _freeze(clip: Clip) -> LoraState:
    """Freeze the base, and record which weights were trainable.

    All attention modules are grafted, not only those with an update: torch chooses their kernels by whether
    weights want gradients, so that freezing alone would change the last bits of what they compute. Batch
    norms use their running averages in training too, and keep them.
    """
    trainable = frozenset(name for name, p in clip.model.named_parameters() if p.requires_grad)
    state = LoraState(trainable, {part: p.detach().clone() for part, p in clip.temperature.items()})
    for path in {ref.module for ref in clip.site_refs.values() if ref.kind == "fused"}:
        host = clip.model.get_submodule(path)
        graft_attention(host)
        if isinstance(clip.model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            # torch's block reads the weights of its attention, and calls it only where that has a hook.
            state.hooks[path] = host.register_forward_hook(_look_on)
    for norm in _batch_norms(clip):
        norm.eval()
        norm.train = partial(_stay_in_eval, norm)  # type: ignore[method-assign]
    clip.model.requires_grad_(False)
    clip.model.zero_grad(set_to_none=True)
    object.__setattr__(clip.model, STATE, state)
    return state


def _batch_norms(clip: Clip) -> list[nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in clip.model.modules() if isinstance(module, kind)]


def _stay_in_eval(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces the `train` of a batch norm, whose running averages are the base's: no adapter holds them."""
    return norm


def _hang(clip: Clip, state: LoraState, name: str, adapter: Adapter) -> None:
    """Register an adapter's modules in their slots."""
    refs, norms = clip.site_refs, clip.family.norms(clip.model)
    for site, layer in adapter.layers.items():
        if str(site) not in state.slots:
            _graft(clip.model, refs[site], state)
        state.slots[str(site)].put(name, layer.train(clip.model.training))
    for path, bias in adapter.norms.items():
        if path not in state.slots:
            state.slots[path] = norms[path].lora = AdapterSlot()
            state.hooks[path] = norms[path].register_forward_hook(_add_bias)
        state.slots[path].put(name, bias)
    if adapter.settings.train_logit_scale or adapter.temperature is not None:
        base = {part: value.clone() for part, value in state.base_temperature.items()}
        adapter.temperature = {**base, **(adapter.temperature or {})}
    state.adapters = {**state.adapters, name: adapter}


def _graft(model: nn.Module, ref: SiteRef, state: LoraState) -> None:
    host, slot = model.get_submodule(ref.module), AdapterSlot()
    state.slots[str(ref.site)] = slot
    if ref.kind == "fused":
        setattr(host, slot_name(ref.site), slot)
    elif ref.kind == "projection":
        graft_projection(host, ref.parameter, slot)
    elif ref.kind in ("read", "table"):
        graft_read(model, ref, slot)
    elif ref.kind == "rows":
        hook = graft_rows(host, ref, slot)
        if hook is not None:
            state.hooks[str(ref.site)] = hook
    else:
        host.lora = slot
        state.hooks[str(ref.site)] = host.register_forward_hook(_adapt)


def _look_on(host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Change nothing."""


def _adapt(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    slot = host.lora
    assert isinstance(slot, AdapterSlot)
    layer = slot.current
    if layer is None:
        return output
    weight, bias = host.weight, getattr(host, "bias", None)
    assert isinstance(weight, Tensor)
    return layer.adapt(output, args[0], weight, bias, host)


def _add_bias(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    slot = host.lora
    assert isinstance(slot, AdapterSlot)
    layer = slot.current_bias
    if layer is None:
        return output
    bias = layer.lora_bias.to(output.dtype)
    # timm's norms of (N, C, H, W) are layer norms by class.
    return output + (bias[:, None, None] if type(host).__name__.endswith("2d") else bias)


def remove_lora(model: ClipLike, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Remove an adapter, or all; without any, the model is the untouched base, and trains as before.

    What is merged into the base is unmerged first, if that is to go. If the active adapter goes and others
    stay, none is active.

    Args:
        model: a `Clip` or raw model that carries adapters.
        name: which one; by default all.
        keep_merged: when all go, leave what is merged in the weights for good: the model is another base
            then, and needs clipgraft no more.

    Raises:
        AdapterError: the model carries no adapter, none of that name, others of it are merged, or there is
            nothing merged to be kept.
    """
    clip = as_clip(model)
    with rwlock_of(clip.model).preparing():
        state = require_lora(clip)
        gone = set(state.adapters) if name is None else {name}
        if name is not None:
            state.named(name)
        if gone != set(state.adapters):
            require_unmerged(clip, f"remove {name!r}")
        if keep_merged and (name is not None or state.merged is None):
            raise AdapterError(
                "keep_merged leaves merged weights when all adapters go: call merge_lora first"
            )
        with rwlock_of(clip.model).write():
            temperature = {part: p.data for part, p in clip.temperature.items()}
            if keep_merged:
                state.merged = None
            restore_base(clip, state)
            make_active(clip, state, state.active)
            _take_off(clip, state, gone)
            if not state.adapters:
                _ungraft_all(clip, state)
            if keep_merged:
                for part, parameter in clip.temperature.items():
                    parameter.data = temperature[part]


def _take_off(clip: Clip, state: LoraState, names: set[str]) -> None:
    """Remove adapters from their slots, if the model carries them."""
    if state.active in names:
        make_active(clip, state, None)
    for slot in state.slots.values():
        for name in names:
            slot.drop(name)
    state.adapters = {kept: adapter for kept, adapter in state.adapters.items() if kept not in names}


def _ungraft_all(clip: Clip, state: LoraState) -> None:
    """Restore the base as it was before the first adapter."""
    for hook in state.hooks.values():
        hook.remove()
    for site, ref in reversed(clip.site_refs.items()):
        host, has_slot = clip.model.get_submodule(ref.module), str(site) in state.slots
        if ref.kind == "fused":
            ungraft_attention(host)
        if not has_slot:
            continue
        if ref.kind == "fused":
            delattr(host, slot_name(site))
        elif ref.kind == "projection":
            ungraft_projection(host, ref.parameter)
        elif ref.kind in ("read", "table"):
            ungraft_read(clip.model, ref)
        elif ref.kind == "rows":
            ungraft_rows(host)
        else:
            del host.lora
    for path, norm in clip.family.norms(clip.model).items():
        if path in state.slots:
            del norm.lora
    for parameter_name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(parameter_name in state.trainable)
    for module in _batch_norms(clip):
        module.__dict__.pop("train", None)
        module.train(clip.model.training)
    delattr(clip.model, STATE)
