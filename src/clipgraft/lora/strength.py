"""An adapter at another strength: W + s·(W' - W) in place of W', without a copy of its A and B."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipgraft.lora.layers import BiasLayer, LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.models.clip import Clip
from clipgraft.models.family import site_weight
from clipgraft.models.rwlock import rwlock_of

_LEAST = 1e-6
_L = TypeVar("_L", LoraLayer, BiasLayer)


def at_strength(clip: Clip, adapter: Adapter, strength: float) -> Adapter:
    """Return an adapter whose update is multiplied by a number; 1 is the adapter itself.

    Its weights become W + s·(W' - W), its biases and log temperature likewise, as `merge_lora` does with a
    weight. It is made to compute with: it shares tensors with the adapter, is not to be trained, and its
    updates that rescale keep the factors that they have now.

    Args:
        clip: the base that the adapter was built for.
        adapter: on the model or not.
        strength: any finite number.
    """
    if strength == 1:
        return adapter
    refs = clip.site_refs
    with rwlock_of(clip.model).read(), torch.no_grad():
        layers = {
            site: Interpolated(layer, site_weight(clip.model, refs[site]), strength)
            if layer.rescales
            else _scaled(layer, strength)
            for site, layer in adapter.layers.items()
        }
        norms = {path: _scaled(layer, strength) for path, layer in adapter.norms.items()}
        plain = adapter.prepared is not None and all(layer.is_plain for layer in layers.values())
        products = {key: one.scaled(strength) for key, one in adapter.prepared.items()} if plain else None
    return replace(adapter, layers=layers, norms=norms, temperature=None, prepared=products)


def _scaled(layer: _L, strength: float) -> _L:
    """The layer with s times its update: the same A and B at another scale."""
    twin = copy.copy(layer)
    if isinstance(twin, LoraLayer):
        twin.scaling = strength * twin.scaling
    if layer.lora_bias is not None:
        twin._parameters = {**layer._parameters, "lora_bias": _frozen(strength * layer.lora_bias)}
    return twin


class Interpolated(LoraLayer):
    """A rescaled update between the base and itself.

    With W' = f ∘ (W + c·B·A), one factor f for each output, W + s·(W' - W) = g ∘ (W + c·(s·f/g) ∘ B·A) where
    g = 1 + s·(f - 1): again one factor for each output, and a low-rank update.

    Attributes:
        factor: (out,), g.
        lora_A, lora_B: the A of the update, and its B with s·f/g in it.
    """

    variant = "interpolated"
    label = "interpolated LoRA"
    rescales = True
    factor: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, layer: LoraLayer, weight: Tensor, strength: float) -> None:
        """`weight` is the base's W in canonical shape."""
        nn.Module.__init__(self)  # the tensors are those of a layer that exists
        given = layer.rescale(weight).detach()
        factor = 1 + strength * (given - 1)
        # A divisor that loses nothing: an output of factor 0 keeps a millionth of the base's.
        factor = torch.where(factor.abs() < _LEAST, _LEAST, factor)
        a, b = (part.detach() for part in layer.factors())
        ratio = (strength * given / factor).view(-1, *[1] * (b.ndim - 1))
        self.kind, self.r, self.alpha, self.dropout = layer.kind, layer.r, layer.alpha, 0.0
        self.scaling = layer.scaling
        self.register_buffer("factor", factor)
        self.lora_A, self.lora_B = _frozen(a), _frozen(ratio * b)
        self.lora_bias = None if layer.lora_bias is None else _frozen(strength * layer.lora_bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def rescale(self, weight: Tensor) -> Tensor:
        return self.factor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
