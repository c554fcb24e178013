"""Conversions between clipgraft and stock PEFT, on `transformers.CLIPModel` and on open_clip."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
from torch import nn

import clipgraft as cg
from benchmarks.conversions.world import Outcome, Row, World, adapted, by_family, randomise, seeded

_TABLES_AND_CONV = ["token_embedding", "position_embedding", "patch_embedding"]
_EVERY_MODULE = [
    *_TABLES_AND_CONV,
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    *("visual_projection", "text_projection"),
]
_PATTERNS: dict[str, Any] = {
    "targets": "all",
    "alpha": 12,
    "use_rslora": True,
    "rank_pattern": {"text.0.*": 4, "vision.-1.q": 7, "vision.proj": 1, "text.token_embedding": 5},
    "alpha_pattern": {"*.*.fc1": 9.0, "vision.patch_embedding": 6.0},
}
_OURS: dict[str, dict[str, Any]] = {
    "r=16, attention": {"targets": "attention"},
    "r=16, every site": {"targets": "all"},
    "DoRA, every site": {"targets": "all", "use_dora": True},
    "rsLoRA, rank and alpha patterns, every site": _PATTERNS,
    "bias=lora_only, attention": {"targets": "attention", "bias": "lora_only"},
    "bias=all, attention": {"targets": "attention", "bias": "all"},
    "PiSSA, q, v and fc1 of the first blocks": {"targets": "*.0.q+v+fc1", "init": "pissa"},
}
_THEIRS: dict[str, dict[str, Any]] = {
    "r=16, q and v": {"target_modules": ["q_proj", "v_proj"]},
    "r=16, every module": {"target_modules": _EVERY_MODULE},
    "DoRA, every module": {"target_modules": _EVERY_MODULE, "use_dora": True},
    "bias=lora_only": {"target_modules": ["k_proj", "fc1"], "bias": "lora_only"},
    "bias=all": {"target_modules": ["out_proj"], "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj", "fc2"], "lora_bias": True},
    "modules_to_save, both projections": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["text_projection", "visual_projection"],
    },
    "PiSSA, q, v and fc1 of the first blocks": {
        "target_modules": [
            f"layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1")
        ],
        "init_lora_weights": "pissa",
    },
    "rank and alpha patterns, every module": {
        "target_modules": _EVERY_MODULE,
        "rank_pattern": {"q_proj": 2, r"vision_model\..*\.fc2": 3},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, "token_embedding": 1},
    },
}
_ON_OPENCLIP: dict[str, list[str]] = {
    "attention": ["attn"],
    "every module it can": ["attn", "c_fc", "c_proj", "conv1", "token_embedding"],
}


def rows() -> list[Row]:
    made: list[Row] = []
    for name, options in _OURS.items():
        run = partial(_ours_to_peft, options=options)
        made += by_family("clipgraft -> stock PEFT", f"{name}; trained on {{}}", run)
    for name, options in _THEIRS.items():
        run = partial(_peft_to_ours, options=options)
        made += by_family("stock PEFT -> clipgraft", f"{name}; loaded on {{}}", run)
    for name, modules in _ON_OPENCLIP.items():
        run = partial(_openclip_peft_to_ours, modules=modules)
        made += by_family("PEFT on open_clip -> clipgraft, as-run", f"{name}; loaded on {{}}", run)
    return made


def open_in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """Open an adapter folder with stock PEFT; its warnings of missing keys are errors here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        opened = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    return inner(opened)


def inner(model: Any) -> nn.Module:
    """Return the adapted model inside PEFT's wrapper."""
    found: nn.Module = model.get_base_model()
    return found


def train_with_peft(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Save a stock PEFT model as after training in `folder`; returns the adapted model."""
    config = peft.LoraConfig(**{"r": 16, "lora_alpha": 12, **options})
    with seeded(0):
        wrapped: Any = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(wrapped.eval())
    wrapped.save_pretrained(str(folder))
    return inner(wrapped)


def _ours_to_peft(world: World, family: str, options: dict[str, Any]) -> Outcome:
    clip = adapted(world, family, **options)
    folder = cg.save_adapter(clip, world.place())
    stock = open_in_peft(world.fresh("transformers").model, folder)
    return world.compare(world.run(stock), world.run(clip.model))


def _peft_to_ours(world: World, family: str, options: dict[str, Any]) -> Outcome:
    folder = world.place()
    wanted = world.run(train_with_peft(world.bases["transformers"].model, folder, **options))
    clip = world.fresh(family)
    cg.load_adapter(clip, folder)
    return world.compare(world.run(clip.model), wanted)


def _openclip_peft_to_ours(world: World, family: str, modules: list[str]) -> Outcome:
    folder = world.place()
    wanted = world.run(train_with_peft(world.bases["open_clip"].model, folder, target_modules=modules))
    clip = world.fresh(family)
    cg.load_adapter(clip, folder, peft_out_proj="as-run")
    return world.compare(world.run(clip.model), wanted)
