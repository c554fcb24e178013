"""Count parameters, and verify that the right ones have gradients."""

from __future__ import annotations

from dataclasses import dataclass

from clipgraft.errors import TrainingError
from clipgraft.lora.state import lora_state, require_unmerged
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.models.family import is_lora


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
    without, whatever requires gradients.

    Returns:
        How many weights have a gradient.

    Raises:
        AdapterError: adapters are merged into the base, where nothing can train.
        TrainingError: naming the first weights that break the rule.
    """
    clip = as_clip(model)
    require_unmerged(clip, "train")
    named = [(name, p) for name, p in clip.model.named_parameters() if p.numel()]
    state, scale = lora_state(clip), clip.logit_scale
    if state is None:
        wanted = {name for name, p in named if p.requires_grad}
    else:
        adapter = state.chosen()
        own = {id(p) for p in adapter.parameters()}
        trains_scale = adapter.settings.train_logit_scale
        wanted = {name for name, p in named if id(p) in own or (trains_scale and p is scale)}
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
