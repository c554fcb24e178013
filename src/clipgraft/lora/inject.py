"""Attach low-rank updates to a model and take them off again: the only file that changes a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from clipgraft.errors import AdapterError, ConfigError, TrainingError
from clipgraft.lora.attention import fused_forward, multihead_forward
from clipgraft.lora.layers import LoraLayer
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
    """The updates attached to a model, kept on the model itself."""

    settings: LoraSettings
    layers: dict[Site, LoraLayer]
    hooks: list[RemovableHandle]


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
    ranks = override_values(chosen, settings.rank_pattern)
    alphas = override_values(chosen, settings.alpha_pattern)
    _check(settings, ranks.values())
    _ = clip.fingerprint  # taken while the weights are certainly the base's
    clip.model.requires_grad_(False)
    state = LoraState(settings, {}, [])
    for site in chosen:
        layer = LoraLayer(
            refs[site],
            ranks.get(site, settings.r),
            alphas.get(site, settings.alpha),
            settings.dropout,
            settings.use_rslora,
        ).to(clip.device)
        _graft(clip.model, refs[site], layer, state.hooks)
        state.layers[site] = layer
    clip.logit_scale.requires_grad_(settings.train_logit_scale)
    object.__setattr__(clip.model, _STATE, state)
    for layer in state.layers.values():
        layer.train(clip.model.training)
    return state.layers


def _check(settings: LoraSettings, ranks: Iterable[int]) -> None:
    faults = [f"r must be at least 1, got {r}" for r in (settings.r, *ranks) if r < 1]
    if settings.alpha <= 0:
        faults.append(f"alpha must be positive, got {settings.alpha:g}")
    if not 0 <= settings.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {settings.dropout:g}")
    if faults:
        raise ConfigError("LoRA: " + "; ".join(faults))


def _graft(model: nn.Module, ref: SiteRef, layer: LoraLayer, hooks: list[RemovableHandle]) -> None:
    host = submodule(model, ref.module)
    if ref.kind == "fused":
        setattr(host, f"lora_{ref.site.role}", layer)
        multihead = isinstance(host, nn.MultiheadAttention)
        host.forward = MethodType(multihead_forward if multihead else fused_forward, host)
    elif ref.kind == "projection":
        weight = host._parameters.pop(ref.parameter)
        assert weight is not None
        setattr(host, ref.parameter, AdaptedProjection(weight, layer))
    elif ref.kind == "table":
        parametrize.register_parametrization(host, ref.parameter, AdaptedTable(layer))
    else:
        host.lora = layer
        hooks.append(host.register_forward_hook(_add_update))


def _add_update(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    layer = host.lora
    assert isinstance(layer, LoraLayer)
    return output + layer(args[0], host).to(output.dtype) if layer.enabled else output


class AdaptedProjection(nn.Module):
    """Stands where a raw (in, out) Parameter stood, for models that compute `x @ self.proj`.

    torch hands `tensor @ self` to `__torch_function__`, so that the update acts on `x` itself and dropout
    can be on the adapter path, which no replacement of the weight could do.
    """

    def __init__(self, weight: nn.Parameter, layer: LoraLayer) -> None:
        super().__init__()
        self.weight = weight
        self.lora = layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = x @ self.weight
        return out + self.lora(x).to(out.dtype) if self.lora.enabled else out

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul) and isinstance(args[1], cls):
            return args[1](args[0])
        plain = [arg.weight if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class AdaptedTable(nn.Module):
    """Parametrisation of a raw (rows, dim) position table: W + ΔW, dropout not defined on positions."""

    def __init__(self, layer: LoraLayer) -> None:
        super().__init__()
        self.lora = layer

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora.delta_weight().to(weight.dtype) if self.lora.enabled else weight


def remove_lora(model: ClipLike) -> None:
    """Take every update off again; the model is the untouched base, with the base still frozen."""
    clip = as_clip(model)
    state = require_lora(clip.model)
    for hook in state.hooks:
        hook.remove()
    for site, ref in clip.site_refs.items():
        if site in state.layers:
            _ungraft(clip.model, ref)
    delattr(clip.model, _STATE)


def _ungraft(model: nn.Module, ref: SiteRef) -> None:
    host = submodule(model, ref.module)
    if ref.kind == "fused":
        delattr(host, f"lora_{ref.site.role}")
        host.__dict__.pop("forward", None)
    elif ref.kind == "projection":
        wrapper = getattr(host, ref.parameter)
        delattr(host, ref.parameter)
        host.register_parameter(ref.parameter, wrapper.weight)
    elif ref.kind == "table":
        parametrize.remove_parametrizations(host, ref.parameter, leave_parametrized=False)
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
    for layer in require_lora(model).layers.values():
        layer.enabled = True


def disable_lora(model: ClipLike) -> None:
    """Make the model behave as its base, to the bit; the updates stay attached."""
    for layer in require_lora(model).layers.values():
        layer.enabled = False


@contextlib.contextmanager
def lora_disabled(model: ClipLike) -> Iterator[None]:
    """`with lora_disabled(model): ...` runs the base; what was enabled before is enabled after."""
    layers = list(require_lora(model).layers.values())
    before = [layer.enabled for layer in layers]
    disable_lora(model)
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


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
    """After a backward pass: every trainable weight has a gradient and no frozen one has.

    Returns:
        How many weights have a gradient.

    Raises:
        TrainingError: naming the first weights that break the rule.
    """
    named = list(as_clip(model).model.named_parameters())
    leaked = [name for name, p in named if p.grad is not None and not p.requires_grad]
    missing = [name for name, p in named if p.grad is None and p.requires_grad]
    if leaked:
        raise TrainingError(
            f"{len(leaked)} frozen weights have gradients, {_some(leaked)}: freeze before backward"
        )
    if missing:
        raise TrainingError(
            f"{len(missing)} trainable weights got no gradient, {_some(missing)}: "
            "their output is not part of the loss, or LoRA is disabled (enable_lora)"
        )
    return sum(p.grad is not None for _, p in named)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
