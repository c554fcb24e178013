"""clipgraft: graft LoRA adapters onto CLIP models.

Names are imported on first use, so that `import clipgraft` loads neither torch nor anything large.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "clipgraft.adapters.formats": (
        "read_any",
        "write_any",
    ),
    "clipgraft.adapters.guide": (
        "apply_lora_to_text_encoder",
        "get_lora_state_dict",
        "load_lora_adapters",
        "save_lora_adapters",
    ),
    "clipgraft.adapters.loading": ("load_adapter",),
    "clipgraft.adapters.native": (
        "lora_state_dict",
        "read_adapter",
        "save_adapter",
    ),
    "clipgraft.adapters.open": (
        "Clip",
        "load",
    ),
    "clipgraft.compact.model": (
        "Compacted",
        "compact_model",
    ),
    "clipgraft.compact.write": ("write_compact",),
    "clipgraft.emoji.scenes": (
        "EmojiScenes",
        "write_scenes",
    ),
    "clipgraft.emoji.classes": ("write_classes",),
    "clipgraft.data.feature_cache": ("FeatureCache",),
    "clipgraft.data.labels": (
        "Labelled",
        "few_shot",
        "split_labelled",
    ),
    "clipgraft.data.labels_read": ("read_labelled",),
    "clipgraft.data.pairs": (
        "Pairs",
        "read_pairs",
    ),
    "clipgraft.data.prompts": (
        "class_prompts",
        "read_prompts",
    ),
    "clipgraft.data.texts": ("read_texts",),
    "clipgraft.errors": (
        "AdapterError",
        "BusyError",
        "CheckpointError",
        "ClipgraftError",
        "ClusterError",
        "ConfigError",
        "DataError",
        "ModelError",
        "TargetError",
        "TrainingError",
        "WriteError",
    ),
    "clipgraft.evaluate.classify": (
        "classification_metrics",
        "evaluate_classification",
    ),
    "clipgraft.evaluate.metrics": ("retrieval_metrics",),
    "clipgraft.evaluate.retrieval": ("evaluate_retrieval",),
    "clipgraft.lora.combine": (
        "Combination",
        "combine_adapters",
    ),
    "clipgraft.lora.counting": (
        "count_parameters",
        "verify_gradients",
    ),
    "clipgraft.lora.inject": (
        "apply_lora",
        "remove_lora",
    ),
    "clipgraft.lora.merge": (
        "merge_lora",
        "unmerge_lora",
    ),
    "clipgraft.lora.starts": ("start_from_data",),
    "clipgraft.lora.switch": (
        "disable_lora",
        "enable_lora",
        "lora_disabled",
        "set_adapter",
    ),
    "clipgraft.models.sites": ("Site",),
    "clipgraft.models.unloaded": ("clip_on_meta",),
    "clipgraft.profile.forward": ("profile_clip",),
    "clipgraft.profile.inspection": ("inspect_model",),
    "clipgraft.profile.layers": ("layer_table",),
    "clipgraft.profile.llava": (
        "LlavaTokens",
        "llava_on_meta",
        "profile_llava",
    ),
    "clipgraft.profile.targets": ("target_costs",),
    "clipgraft.profile.training": ("training_costs",),
    "clipgraft.train.distill": ("distill",),
    "clipgraft.search.encode": (
        "EncodeResult",
        "encode_folder",
    ),
    "clipgraft.search.index": ("build_index",),
    "clipgraft.search.query": (
        "Hit",
        "search_folder",
    ),
    "clipgraft.train.fit": (
        "FitResult",
        "fit",
    ),
    "clipgraft.train.fit_classes": ("fit_classifier",),
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
    return __all__


if TYPE_CHECKING:
    from clipgraft.adapters.formats import read_any as read_any
    from clipgraft.adapters.formats import write_any as write_any
    from clipgraft.adapters.guide import apply_lora_to_text_encoder as apply_lora_to_text_encoder
    from clipgraft.adapters.guide import get_lora_state_dict as get_lora_state_dict
    from clipgraft.adapters.guide import load_lora_adapters as load_lora_adapters
    from clipgraft.adapters.guide import save_lora_adapters as save_lora_adapters
    from clipgraft.adapters.loading import load_adapter as load_adapter
    from clipgraft.adapters.native import lora_state_dict as lora_state_dict
    from clipgraft.adapters.native import read_adapter as read_adapter
    from clipgraft.adapters.native import save_adapter as save_adapter
    from clipgraft.adapters.open import Clip as Clip
    from clipgraft.adapters.open import load as load
    from clipgraft.compact.model import Compacted as Compacted
    from clipgraft.compact.model import compact_model as compact_model
    from clipgraft.compact.write import write_compact as write_compact
    from clipgraft.data.feature_cache import FeatureCache as FeatureCache
    from clipgraft.data.labels import Labelled as Labelled
    from clipgraft.data.labels import few_shot as few_shot
    from clipgraft.data.labels import split_labelled as split_labelled
    from clipgraft.data.labels_read import read_labelled as read_labelled
    from clipgraft.data.pairs import Pairs as Pairs
    from clipgraft.data.pairs import read_pairs as read_pairs
    from clipgraft.data.prompts import class_prompts as class_prompts
    from clipgraft.data.prompts import read_prompts as read_prompts
    from clipgraft.data.texts import read_texts as read_texts
    from clipgraft.emoji.classes import write_classes as write_classes
    from clipgraft.emoji.scenes import EmojiScenes as EmojiScenes
    from clipgraft.emoji.scenes import write_scenes as write_scenes
    from clipgraft.errors import AdapterError as AdapterError
    from clipgraft.errors import BusyError as BusyError
    from clipgraft.errors import CheckpointError as CheckpointError
    from clipgraft.errors import ClipgraftError as ClipgraftError
    from clipgraft.errors import ClusterError as ClusterError
    from clipgraft.errors import ConfigError as ConfigError
    from clipgraft.errors import DataError as DataError
    from clipgraft.errors import ModelError as ModelError
    from clipgraft.errors import TargetError as TargetError
    from clipgraft.errors import TrainingError as TrainingError
    from clipgraft.errors import WriteError as WriteError
    from clipgraft.evaluate.classify import classification_metrics as classification_metrics
    from clipgraft.evaluate.classify import evaluate_classification as evaluate_classification
    from clipgraft.evaluate.metrics import retrieval_metrics as retrieval_metrics
    from clipgraft.evaluate.retrieval import evaluate_retrieval as evaluate_retrieval
    from clipgraft.lora.combine import Combination as Combination
    from clipgraft.lora.combine import combine_adapters as combine_adapters
    from clipgraft.lora.counting import count_parameters as count_parameters
    from clipgraft.lora.counting import verify_gradients as verify_gradients
    from clipgraft.lora.inject import apply_lora as apply_lora
    from clipgraft.lora.inject import remove_lora as remove_lora
    from clipgraft.lora.merge import merge_lora as merge_lora
    from clipgraft.lora.merge import unmerge_lora as unmerge_lora
    from clipgraft.lora.starts import start_from_data as start_from_data
    from clipgraft.lora.switch import disable_lora as disable_lora
    from clipgraft.lora.switch import enable_lora as enable_lora
    from clipgraft.lora.switch import lora_disabled as lora_disabled
    from clipgraft.lora.switch import set_adapter as set_adapter
    from clipgraft.models.sites import Site as Site
    from clipgraft.models.unloaded import clip_on_meta as clip_on_meta
    from clipgraft.profile.forward import profile_clip as profile_clip
    from clipgraft.profile.inspection import inspect_model as inspect_model
    from clipgraft.profile.layers import layer_table as layer_table
    from clipgraft.profile.llava import LlavaTokens as LlavaTokens
    from clipgraft.profile.llava import llava_on_meta as llava_on_meta
    from clipgraft.profile.llava import profile_llava as profile_llava
    from clipgraft.profile.targets import target_costs as target_costs
    from clipgraft.profile.training import training_costs as training_costs
    from clipgraft.search.encode import EncodeResult as EncodeResult
    from clipgraft.search.encode import encode_folder as encode_folder
    from clipgraft.search.index import build_index as build_index
    from clipgraft.search.query import Hit as Hit
    from clipgraft.search.query import search_folder as search_folder
    from clipgraft.train.distill import distill as distill
    from clipgraft.train.fit import FitResult as FitResult
    from clipgraft.train.fit import fit as fit
    from clipgraft.train.fit_classes import fit_classifier as fit_classifier
