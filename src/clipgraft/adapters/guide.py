"""The guide's function names, as thin aliases and as methods of `Clip`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, lora_state_dict, save_adapter
from clipgraft.adapters.attach import load_adapter
from clipgraft.lora.control import disable_lora, enable_lora
from clipgraft.lora.inject import apply_lora
from clipgraft.lora.merge import merge_lora, unmerge_lora
from clipgraft.lora.parameters import count_parameters, verify_gradients
from clipgraft.lora.state import require_lora
from clipgraft.lora.targets import guide_targets
from clipgraft.models.clip import Clip, ClipLike


def apply_lora_to_text_encoder(
    model: ClipLike,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
) -> int:
    """`apply_lora` on the text tower by the guide's module names; returns how many blocks carry LoRA."""
    targets = guide_targets(("in_proj", "out_proj") if target_modules is None else target_modules)
    apply_lora(model, r=r, alpha=lora_alpha, dropout=lora_dropout, targets=targets)
    return len({site.block for site in require_lora(model).layers})


def get_lora_state_dict(model: ClipLike) -> dict[str, Tensor]:
    """`lora_state_dict`."""
    return lora_state_dict(model)


def save_lora_adapters(model: ClipLike, path: str | Path) -> Path:
    """`save_adapter`."""
    return save_adapter(model, path)


def load_lora_adapters(model: ClipLike, path: str | Path) -> AdapterFile:
    """`load_adapter`."""
    return load_adapter(model, path)


# Attached from here because `models` stands below `lora` and may not import it.
CLIP_METHODS = (
    apply_lora_to_text_encoder,
    enable_lora,
    disable_lora,
    merge_lora,
    unmerge_lora,
    count_parameters,
    verify_gradients,
    get_lora_state_dict,
    save_lora_adapters,
    load_lora_adapters,
)
for _function in CLIP_METHODS:
    setattr(Clip, _function.__name__, _function)
