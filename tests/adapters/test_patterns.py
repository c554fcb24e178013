"""PEFT's regular expressions give what PEFT makes of them, and no stranger's expression runs for long."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import clipgraft as cg
from clipgraft.adapters.patterns import PatternError, end_of_path, targeted, whole_path
from clipgraft.models.clip import as_clip
from peft_models import outputs
from tiny_models import build_hf

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]
PATHS = [
    f"{tower}_model.encoder.layers.{block}.{module}"
    for tower in ("text", "vision")
    for block in (0, 1, 10)
    for module in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
]
PATTERNS = [
    "q_proj",
    "q.proj",
    r"self_attn\.q_proj",
    r"text_model\.encoder\.layers\.0\.self_attn\.q_proj",
    r".*text_model.*(q|v)_proj",
    r"layers\.[01]\..*",
    r"layers\.(?:0|10)\.mlp\.fc\d+",
    r"[^.]+_proj",
    r"(text|vision)_model\..*\.fc1",
    r"(?P<name>q|out)_proj",
    r"\bfc1\b",
    "a)|(fc1",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_python_and_re2_agree(pattern: str) -> None:
    """A pattern gives some sites another rank or alpha than PEFT gives them."""
    ours, whole = end_of_path(pattern), whole_path(pattern)
    for path in PATHS:
        assert ours(path) == bool(re.match(rf"(.*\.)?({pattern})$", path))
        assert whole(path) == bool(re.match(rf"(?:{pattern})$", path))


HOSTILE = [
    "q_proj\ud800",
    "(([a-z_.0-9]+)+)+!",
    "(.*a){30}",
    "a{99999999999999999999}",
    "(" * 3000 + ")" * 3000,
    "((((((((((((((((((((((x))))))))))))))))))))))",
    "x" * 5000,
    r"(q)\1",
    "(?=q)q_proj",
    "(?i)Q_PROJ",
    r"\Qq_proj\E",
    "[[:alpha:]]+",
    "[",
    "(",
    "*",
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_hostile_patterns_are_refused(tiny_hf: nn.Module, tmp_path: Path, pattern: str, key: str) -> None:
    """A stranger's pattern hangs the program, ends in a traceback, or is read otherwise than PEFT does."""
    get_peft_model(tiny_hf, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: {pattern: 4}}), encoding="utf-8")
    with pytest.raises(cg.errors.AdapterError) as caught:
        cg.read_adapter(tmp_path)
    message = str(caught.value)
    assert key in message
    assert "adapter_config.json" in message
    assert len(message) < 600


def test_many_stars_are_fast() -> None:
    """A pattern of a few characters takes longer than the age of the universe."""
    matches = end_of_path(".*" * 200 + "!")
    assert not any(matches(path * 5) for path in PATHS)


@given(st.text(alphabet=r"ab.*+?()[]{}|\d0123,^$:=!<P", max_size=30))
def test_any_pattern_ends(pattern: str) -> None:
    """Some pattern of a stranger ends in another error than the one that names it."""
    with contextlib.suppress(PatternError):
        assert end_of_path(pattern)(PATHS[0]) in (True, False)


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "fc1"]},
    {"target_modules": r".*text_model.*(q|v)_proj"},
    {"target_modules": r".*\.layers\.0\..*_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r"vision_model.*"},
    {"target_modules": ["q_proj", "visual_projection"], "exclude_modules": ["visual_projection"]},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_targets_are_pefts(tiny_hf: nn.Module, tmp_path: Path, options: dict[str, Any]) -> None:
    """A folder with pattern targets is called incomplete, or an incomplete one whole."""
    paths = [
        name for name, module in tiny_hf.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
    ]
    model = get_peft_model(tiny_hf, LoraConfig(r=2, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    names = torch.nn.Module.named_modules(model.get_base_model())
    adapted = {name for name, module in names if hasattr(module, "lora_A")}
    assert set(targeted(config, paths)) == adapted


@pytest.mark.parametrize("options", CONFIGS[1:4])
def test_patterns_of_a_whole_folder(tiny_hf: nn.Module, tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT folders whose ranks and alphas go by patterns compute something else than PEFT does."""
    ranks = {r"self_attn\.q_proj": 5, r"text_model.*v_proj": 3}
    alphas = {r"encoder\.layers\.[1-9]\..*": 6, "q_proj": 20}
    config = LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, rank_pattern=ranks, alpha_pattern=alphas, **options
    )
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(tiny_hf), config).eval()
    model.save_pretrained(tmp_path)
    clip = as_clip(build_hf())
    cg.load_adapter(clip, tmp_path)
    for ours, theirs in zip(outputs(clip.model), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_missing_target_of_a_pattern(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """A folder that lost the weights of a module which its pattern names loads without a word."""
    model = get_peft_model(tiny_hf, LoraConfig(r=2, target_modules=r".*text_model.*(q|v)_proj"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.v_proj" not in name}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(cg.errors.AdapterError, match=r"lacks 1 of its target sites, text\.1\.v"):
        cg.load_adapter(build_hf(), tmp_path)
