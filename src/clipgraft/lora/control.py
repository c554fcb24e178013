"""Choose which adapter acts: activate by name, enable, disable, merge into the base and unmerge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.state import LoraState, Merged, require_lora, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import site_bias, site_weight
from clipgraft.models.rwlock import rwlock_of

_ZERO = torch.zeros(())


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


def adapter_temperature(model: ClipLike, name: str | None = None) -> dict[str, Tensor]:
    """Return the `Clip.temperature` of an adapter, by default of the active one, in effect or not.

    Empty if it trains none; detached, on the model's device.
    """
    state = require_lora(model)
    adapter = state.chosen() if name is None else state.named(name)
    if not adapter.settings.train_logit_scale:
        return {}
    values = as_clip(model).temperature if adapter.temperature is None else adapter.temperature
    return {part: value.detach() for part, value in values.items()}


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
    _put_temperature_aside(clip, state)
    state.active = name
    in_effect, chosen = state.in_effect, state.adapter
    for slot in state.slots.values():
        slot.active = None if in_effect is None else name
    for adapter in state.adapters.values():
        for parameter in adapter.parameters():
            parameter.requires_grad_(adapter is chosen and state.merged is None)
    _show_temperature(clip, state)


def _put_temperature_aside(clip: Clip, state: LoraState) -> None:
    """Restore the base's temperature, and store the adapter's own on the adapter."""
    for adapter in state.adapters.values():
        if adapter.settings.train_logit_scale and adapter.temperature is None:
            adapter.temperature = {part: p.data for part, p in clip.temperature.items()}
    if state.temperature_moved:
        _set_temperature(clip, {part: base.clone() for part, base in state.base_temperature.items()})
        state.temperature_moved = False


def _show_temperature(clip: Clip, state: LoraState) -> None:
    """Show the temperature of the adapter in effect, or of what is merged."""
    in_effect = state.in_effect
    shown = None if in_effect is None else in_effect.temperature
    for parameter in clip.temperature.values():
        parameter.requires_grad_(shown is not None)
    if in_effect is not None and shown is not None:
        _set_temperature(clip, shown)
        in_effect.temperature, state.temperature_moved = None, True
    elif state.merged is not None:
        moved = temperature_shift(clip, state, state.merged.weights)
        if moved:
            base = state.base_temperature
            _set_temperature(clip, {part: base[part] + shift for part, shift in moved.items()})
            state.temperature_moved = True


def _set_temperature(clip: Clip, values: Mapping[str, Tensor]) -> None:
    for part, parameter in clip.temperature.items():
        parameter.data = values[part].to(parameter.device)


def temperature_shift(clip: Clip, state: LoraState, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the weighted sum of how far adapters move the base's temperature; empty if none trains it."""
    trained = [name for name in weights if state.adapters[name].settings.train_logit_scale]
    own = {name: adapter_temperature(clip, name) for name in trained}
    return {
        part: sum((weights[name] * (own[name][part] - base) for name in trained), torch.zeros_like(base))
        for part, base in state.base_temperature.items()
        if trained
    }


def merge_lora(model: ClipLike, names: str | Sequence[str] | Mapping[str, float] | None = None) -> None:
    """Write W' into the base's weights: the model runs with its adapter at the base's cost.

    Updates are computed and added in fp32, whatever the type of the base, and rounded once to that type. The
    bits that are overwritten are kept in memory for `unmerge_lora`; nothing on disk changes.

    Args:
        model: a `Clip` or raw model that carries adapters.
        names: which to merge; by default the active one. Several are added up, with weights if a mapping
            gives them: W + Σ weight · (W' - W).

    Raises:
        AdapterError: no such adapter, or some are merged already.
    """
    clip = as_clip(model)
    with rwlock_of(clip.model).preparing():
        state = require_lora(clip)
        require_unmerged(clip, "merge")
        weights = _weights(state, names)
        with rwlock_of(clip.model).write(), torch.no_grad():
            names_of = {id(p): name for name, p in clip.model.named_parameters(remove_duplicate=False)}
            originals: dict[str, Tensor] = {}
            for weight, change in _changes(clip, state, weights):
                owner = weight._base if weight._base is not None else weight
                originals.setdefault(names_of[id(owner)], owner.detach().clone())
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight.copy_(weight.to(wide) + change.to(wide))
            state.merged = Merged(weights, originals)
            make_active(clip, state, state.active)


def unmerge_lora(model: ClipLike) -> None:
    """Put back every bit that `merge_lora` overwrote; the adapters act as before.

    Raises:
        AdapterError: nothing is merged.
    """
    clip = as_clip(model)
    with rwlock_of(clip.model).preparing():
        state = require_lora(clip)
        if state.merged is None:
            raise AdapterError("nothing is merged into this model: call merge_lora first")
        with rwlock_of(clip.model).write():
            restore_base(clip, state)
            make_active(clip, state, state.active)


def restore_base(clip: Clip, state: LoraState) -> None:
    """Restore the base's own bits if something is merged; the caller holds the model's lock alone."""
    if state.merged is None:
        return
    with torch.no_grad():
        parameters = dict(clip.model.named_parameters(remove_duplicate=False))
        for name, original in state.merged.originals.items():
            parameters[name].copy_(original)
    state.merged = None


def _weights(state: LoraState, names: str | Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    if names is None:
        state.chosen()
        names = str(state.active)
    if isinstance(names, str):
        names = (names,)
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name in weights:
        state.named(name)
    if not weights:
        raise AdapterError(f"nothing to merge: name one of {state.listed()}")
    return {name: float(weight) for name, weight in weights.items()}


def _changes(clip: Clip, state: LoraState, weights: Mapping[str, float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the base's weights and biases, each with what is to be added to it."""
    for site, ref in clip.site_refs.items():
        layers = {name: state.adapters[name].layers.get(site) for name in weights}
        present = {name: layer for name, layer in layers.items() if layer is not None}
        if not present:
            continue
        weight, bias = site_weight(clip.model, ref), site_bias(clip.model, ref)
        yield weight, sum((weights[n] * layer.weight_change(weight) for n, layer in present.items()), _ZERO)
        if bias is not None:
            moves = [
                weights[n] * layer.lora_bias for n, layer in present.items() if layer.lora_bias is not None
            ]
            yield bias, sum(moves, _ZERO)
    for path, norm in clip.family.norms(clip.model).items():
        moved = {name: state.adapters[name].norms.get(path) for name in weights}
        moves = [weights[name] * layer.lora_bias for name, layer in moved.items() if layer is not None]
        if moves:
            yield norm.bias, sum(moves, _ZERO)
