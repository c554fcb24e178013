"""The named adapters of a model, of which at most one is in effect; their weights counted and verified."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipgraft.errors import AdapterError, TrainingError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.layers import AdapterSlot, BiasLayer, LoraLayer
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import is_lora
from clipgraft.models.sites import Site, Tower

STATE = "_clipgraft_lora"
DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")


@dataclass
class Adapter:
    """One adapter on a model.

    Attributes:
        settings: what was asked for.
        layers: its updates by site.
        norms: what it adds to the biases of layer norms, by their path in `transformers.CLIPModel`.
        shared: what all its sites share, as its variant made it; None for nothing.
        temperature: its own `Clip.temperature` while it does not act; None while it does, or if it has none.
        origin: the file that its weights were loaded from; empty for a new one.
        prepared: what the engine computed ahead of an adapter that will not change any more
            (`clipgraft.engine.mixed_adapters.prepare`); None for others.
    """

    settings: LoraConfig
    layers: dict[Site, LoraLayer] = field(default_factory=dict)
    norms: dict[str, BiasLayer] = field(default_factory=dict)
    shared: Any = None
    temperature: Mapping[str, Tensor] | None = None
    origin: str = ""
    prepared: Any = None

    def modules(self) -> Iterator[LoraLayer | BiasLayer]:
        """Iterate over the modules that hold its weights."""
        yield from self.layers.values()
        yield from self.norms.values()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over its weights, empty ones left out."""
        return (p for module in self.modules() for p in module.parameters() if p.numel())

    def touches(self, tower: Tower) -> bool:
        """Whether it changes what a tower computes."""
        return any(site.tower == tower for site in self.layers) or any(
            path.startswith(f"{tower}_model.") for path in self.norms
        )


@dataclass(frozen=True)
class Merged:
    """What is merged into the base's weights, and the bits that were there before, by parameter name."""

    weights: Mapping[str, float]
    originals: Mapping[str, Tensor]


@dataclass
class LoraState:
    """The adapters attached to a model, kept on the model itself.

    Attributes:
        trainable: names of the base weights that wanted gradients before.
        base_temperature: the base's own `Clip.temperature`.
        adapters: by name; replaced, never changed, so that who iterates is not disturbed.
        active: the name of the chosen adapter.
        enabled: whether it acts.
        temperature_moved: whether the model's temperature is another than the base's.
        merged: set while updates are folded into the base's weights, and none acts beside them.
        slots: the place of each site and norm that has one, by `str(site)` or the norm's path.
        hooks: what `remove_lora` takes off, by the same names.
    """

    trainable: frozenset[str]
    base_temperature: Mapping[str, Tensor]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    enabled: bool = True
    temperature_moved: bool = False
    merged: Merged | None = None
    slots: dict[str, AdapterSlot] = field(default_factory=dict)
    hooks: dict[str, RemovableHandle] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter | None:
        """The active adapter, in effect or not."""
        return None if self.active is None else self.adapters.get(self.active)

    @property
    def in_effect(self) -> Adapter | None:
        """The adapter that changes what the model computes; None while it is disabled or merged."""
        return self.adapter if self.enabled and self.merged is None else None

    @property
    def layers(self) -> dict[Site, LoraLayer]:
        """The updates of the active adapter by site."""
        return {} if self.adapter is None else self.adapter.layers

    def chosen(self) -> Adapter:
        """Return the active adapter; raises AdapterError if there is none."""
        if self.adapter is None:
            raise AdapterError(f"no adapter is active: call set_adapter with one of {self.listed()}")
        return self.adapter

    def named(self, name: str) -> Adapter:
        """Return an adapter by name; raises AdapterError that lists the names there are."""
        if name not in self.adapters:
            raise AdapterError(f"no adapter {name!r} on this model: loaded are {self.listed()}")
        return self.adapters[name]

    def listed(self) -> str:
        """List the names for a message."""
        return ", ".join(map(repr, self.adapters)) or "none"


def lora_state(model: ClipLike) -> LoraState | None:
    """Return the adapters of a model, or None."""
    state = getattr(model.model if isinstance(model, Clip) else model, STATE, None)
    return state if isinstance(state, LoraState) else None


def require_lora(model: ClipLike) -> LoraState:
    """Return the adapters of a model; raises AdapterError if it has none."""
    state = lora_state(model)
    if state is None:
        raise AdapterError("this model carries no LoRA: call apply_lora or load_adapter first")
    return state


def require_unmerged(model: ClipLike, to: str) -> None:
    """Raise AdapterError while something is merged; `to` says what was attempted."""
    state = lora_state(model)
    if state is not None and state.merged is not None:
        names = ", ".join(map(repr, state.merged.weights))
        raise AdapterError(
            f"cannot {to} while {names} {'is' if len(state.merged.weights) == 1 else 'are'} merged into the "
            "base: call unmerge_lora first"
        )


def check_name(name: str) -> str:
    """Refuse adapter names that module paths and folders cannot hold; raises AdapterError."""
    if _NAME.fullmatch(name) is None:
        raise AdapterError(
            f"adapter name {name!r}: write letters, digits, '_', '-' and '+', the first a letter or digit"
        )
    return name


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
    """Check after a backward pass that every trainable weight has a gradient, and no other one.

    With LoRA attached, what is to train is the active adapter, and the temperature if that was asked for;
    without, whatever requires gradients. A `logit_bias` may be without: a softmax does not depend on it.

    Returns:
        How many weights have a gradient.

    Raises:
        AdapterError: adapters are merged into the base, where nothing can train.
        TrainingError: naming the first weights that break the rule.
    """
    clip = as_clip(model)
    require_unmerged(clip, "train")
    named = [(name, p) for name, p in clip.model.named_parameters() if p.numel()]
    state, optional = lora_state(clip), clip.logit_bias
    if state is None:
        wanted = {name for name, p in named if p.requires_grad}
    else:
        adapter = state.chosen()
        trained = [*adapter.parameters()]
        if adapter.settings.train_logit_scale:
            trained += clip.temperature.values()
        own = set(map(id, trained))
        wanted = {name for name, p in named if id(p) in own}
    leaked = [name for name, p in named if name not in wanted and (p.requires_grad or p.grad is not None)]
    missing = [name for name, p in named if name in wanted and p.grad is None and p is not optional]
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
    return sum(p.grad is not None for _, p in named)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
