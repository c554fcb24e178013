"""clipgraft: graft LoRA adapters onto CLIP models.

Names are imported on first use, so that `import clipgraft` loads neither torch nor anything large.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "clipgraft.adapters.guide": (
        "apply_lora_to_text_encoder",
        "get_lora_state_dict",
        "load_lora_adapters",
        "save_lora_adapters",
    ),
    "clipgraft.adapters.native": ("load_adapter", "lora_state_dict", "read_adapter", "save_adapter"),
    "clipgraft.adapters.open": ("load",),
    "clipgraft.data.emoji": ("EmojiScenes", "write_scenes"),
    "clipgraft.data.pairs": ("Pairs", "read_pairs"),
    "clipgraft.errors": (
        "AdapterError",
        "CheckpointError",
        "ClipgraftError",
        "ConfigError",
        "DataError",
        "ModelError",
        "TargetError",
        "TrainingError",
    ),
    "clipgraft.evaluate.metrics": ("retrieval_metrics",),
    "clipgraft.evaluate.retrieval": ("evaluate_retrieval",),
    "clipgraft.lora.inject": (
        "apply_lora",
        "count_parameters",
        "disable_lora",
        "enable_lora",
        "lora_disabled",
        "remove_lora",
        "verify_gradients",
    ),
    "clipgraft.models.clip": ("Clip",),
    "clipgraft.models.sites": ("Site",),
    "clipgraft.train.fit": ("FitResult", "fit"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipgraft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


if TYPE_CHECKING:
    from clipgraft.adapters.guide import (
        apply_lora_to_text_encoder,
        get_lora_state_dict,
        load_lora_adapters,
        save_lora_adapters,
    )
    from clipgraft.adapters.native import load_adapter, lora_state_dict, read_adapter, save_adapter
    from clipgraft.adapters.open import load
    from clipgraft.data.emoji import EmojiScenes, write_scenes
    from clipgraft.data.pairs import Pairs, read_pairs
    from clipgraft.errors import (
        AdapterError,
        CheckpointError,
        ClipgraftError,
        ConfigError,
        DataError,
        ModelError,
        TargetError,
        TrainingError,
    )
    from clipgraft.evaluate.metrics import retrieval_metrics
    from clipgraft.evaluate.retrieval import evaluate_retrieval
    from clipgraft.lora.inject import (
        apply_lora,
        count_parameters,
        disable_lora,
        enable_lora,
        lora_disabled,
        remove_lora,
        verify_gradients,
    )
    from clipgraft.models.clip import Clip
    from clipgraft.models.sites import Site
    from clipgraft.train.fit import FitResult, fit
