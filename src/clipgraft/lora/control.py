"""Activate an adapter by name; enable and disable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from clipgraft.lora.state import LoraState, require_lora, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.rwlock import rwlock_of


def set_adapter(model: ClipLike, name: str | None) -> None:
    """Activate the adapter of that name and no other; None runs the base.

    Its weights, and its temperature if it has one, are what trains from now on.

    Raises:
        AdapterError: the model carries no such adapter, or some are merged into it.
    """
    clip = as_clip(model)
    with rwlock_of(clip.model).preparing():
        state = require_lora(clip)
        if name is not None:
            state.named(name)
        require_unmerged(clip, "change the adapter")
        with rwlock_of(clip.model).write():
            state.enabled = True
            make_active(clip, state, name)


def enable_lora(model: ClipLike) -> None:
    """Put the active adapter into effect again."""
    _set_enabled(model, True)


def disable_lora(model: ClipLike) -> None:
    """Make the model behave as its base, to the bit, its temperature too; the updates stay attached."""
    _set_enabled(model, False)


@contextlib.contextmanager
def lora_disabled(model: ClipLike) -> Iterator[None]:
    """Run the base inside `with lora_disabled(model): ...`; restore the state at its end."""
    before = require_lora(model).enabled
    _set_enabled(model, False)
    try:
        yield
    finally:
        _set_enabled(model, before)


def adapter_logit_scale(model: ClipLike, name: str | None = None) -> float | None:
    """Return the log temperature of an adapter, by default the active one, in effect or not.

    None if it trains none.
    """
    state = require_lora(model)
    adapter = state.chosen() if name is None else state.named(name)
    if not adapter.settings.train_logit_scale:
        return None
    return float(as_clip(model).logit_scale.detach() if adapter.logit_scale is None else adapter.logit_scale)


def _set_enabled(model: ClipLike, enabled: bool) -> None:
    clip = as_clip(model)
    with rwlock_of(clip.model).preparing():
        state = require_lora(clip)
        if state.enabled == enabled:
            return
        require_unmerged(clip, "enable an adapter" if enabled else "disable it")
        with rwlock_of(clip.model).write():
            state.enabled = enabled
            make_active(clip, state, state.active)


def make_active(clip: Clip, state: LoraState, name: str | None) -> None:
    """Make an adapter the active one; the caller holds the model's lock alone."""
    _put_scale_aside(clip, state)
    state.active = name
    in_effect, chosen = state.in_effect, state.adapter
    for slot in state.slots.values():
        slot.active = None if in_effect is None else name
    for adapter in state.adapters.values():
        for parameter in adapter.parameters():
            parameter.requires_grad_(adapter is chosen and state.merged is None)
    _show_scale(clip, state)


def _put_scale_aside(clip: Clip, state: LoraState) -> None:
    """Restore the base's temperature, and store the adapter's own on the adapter."""
    scale = clip.logit_scale
    for adapter in state.adapters.values():
        if adapter.settings.train_logit_scale and adapter.logit_scale is None:
            adapter.logit_scale = scale.data
    if state.scale_moved:
        scale.data = state.base_scale.clone().to(scale.device)
        state.scale_moved = False


def _show_scale(clip: Clip, state: LoraState) -> None:
    """Show the temperature of the adapter in effect, or of what is merged."""
    scale, in_effect = clip.logit_scale, state.in_effect
    shown = None if in_effect is None else in_effect.logit_scale
    scale.requires_grad_(shown is not None)
    if in_effect is not None and shown is not None:
        scale.data, in_effect.logit_scale, state.scale_moved = shown.to(scale.device), None, True
    elif state.merged is not None:
        moved = {name: state.adapters[name].logit_scale for name in state.merged.weights}
        shifts = [
            state.merged.weights[n] * (own - state.base_scale) for n, own in moved.items() if own is not None
        ]
        if shifts:
            scale.data = (state.base_scale + sum(shifts)).to(scale.device)
            state.scale_moved = True
