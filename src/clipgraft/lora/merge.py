"""Merge updates into the base's weights, and unmerge them to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clipgraft.errors import AdapterError
from clipgraft.lora.control import make_active
from clipgraft.lora.state import LoraState, Merged, require_lora, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import site_bias, site_weight
from clipgraft.models.rwlock import rwlock_of


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
            restore(clip, state)
            make_active(clip, state, state.active)


def restore(clip: Clip, state: LoraState) -> None:
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
        yield (
            weight,
            sum((w * present[n].weight_change(weight) for n, w in weights.items() if n in present), _zero),
        )
        if bias is not None:
            moves = [
                weights[n] * layer.lora_bias for n, layer in present.items() if layer.lora_bias is not None
            ]
            yield bias, sum(moves, _zero)
    for path, norm in clip.family.norms(clip.model).items():
        moved = {name: state.adapters[name].norms.get(path) for name in weights}
        moves = [weights[name] * layer.lora_bias for name, layer in moved.items() if layer is not None]
        if moves:
            yield norm.bias, sum(moves, _zero)


_zero = torch.zeros(())
