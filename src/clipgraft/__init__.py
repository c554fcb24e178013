"""clipgraft: graft LoRA adapters onto CLIP models.

`__init__.pyi` lists the public names. Each is imported on first use, so that `import clipgraft` loads neither
torch nor anything else that is large.
"""

import importlib
import warnings
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_get, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]

# Flat names of earlier versions that stand in a namespace now; they still work, with a warning.
_MOVED = {
    "adapters": ("lora_state_dict", "read_any", "write_any"),
    "compact": ("Compacted", "compact_model", "write_compact"),
    "data": ("FeatureCache", "class_prompts", "few_shot", "read_prompts", "read_texts", "split_labelled"),
    "emoji": ("EmojiScenes", "write_classes", "write_scenes"),
    "errors": (
        *("AdapterError", "BusyError", "CheckpointError", "ClusterError", "ConfigError", "DataError"),
        *("ModelError", "TargetError", "TrainingError", "WriteError"),
    ),
    "evaluate": ("classification_metrics", "retrieval_metrics"),
    "lora": ("Combination", "start_from_data", "verify_gradients"),
    "models": ("Site", "clip_on_meta"),
    "profile": ("LlavaTokens", "layer_table", "llava_on_meta", "target_costs", "training_costs"),
    "search": ("EncodeResult", "Hit", "build_index", "encode_folder"),
    "train": ("FitResult",),
}
_NOW = {name: f"{space}.{name}" for space, names in _MOVED.items() for name in names} | {
    "inspect_model": "profile.inspect",
    "profile_clip": "profile.costs",
    "profile_llava": "profile.llava_costs",
}


def __getattr__(name: str) -> Any:
    if name not in _NOW:
        return _get(name)
    warnings.warn(
        f"clipgraft.{name} is clipgraft.{_NOW[name]} now: write that", DeprecationWarning, stacklevel=2
    )
    space, member = _NOW[name].split(".")
    return getattr(importlib.import_module(f"clipgraft.{space}"), member)


def __dir__() -> list[str]:
    return __all__
