"""Adapter files against stock PEFT: it opens ours, we open its, and both compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from explicit_lora import ROLES, largest, randomise_lora, target
from peft_models import ALL_MODULES, outputs

# PEFT 0.21 reads an attribute that transformers 5.23 is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def test_the_twin_is_one(tiny_hf: nn.Module, openclip_twin: nn.Module) -> None:
    """The tests below would compare two models that differ before they carry any adapter."""
    assert largest(outputs(tiny_hf), outputs(openclip_twin)) <= 1e-5
    assert cg.models.clip.as_clip(tiny_hf).fingerprint == cg.models.clip.as_clip(openclip_twin).fingerprint


OPTIONS: dict[str, dict[str, Any]] = {
    **{role: {"targets": target(role), "r": 3, "alpha": 2.0} for role in ROLES},
    "all": {"targets": "all", "r": 4, "alpha": 8.0},
    "rslora": {"targets": "all", "r": 4, "alpha": 3.0, "use_rslora": True},
    "patterns": {
        "targets": "all",
        "r": 4,
        "alpha": 3.0,
        "rank_pattern": {"text.0.*": 2, "vision.-1.q": 7, "vision.proj": 1, "text.token_embedding": 5},
        "alpha_pattern": {"*.*.fc1": 9.0, "text.*.k+v": 1.5, "vision.patch_embedding": 6.0},
    },
    "rslora with patterns": {
        "targets": "all,-text.1.out",
        "r": 4,
        "alpha": 3.0,
        "use_rslora": True,
        "rank_pattern": {"text.*": 3},
        "alpha_pattern": {"vision.*": 2.0},
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_stock_peft_opens_our_adapters(
    trained_on: nn.Module, tiny_hf: nn.Module, options: str, tmp_path: Path
) -> None:
    """An adapter trained here cannot be used with PEFT, or computes something else there."""
    stock = copy.deepcopy(tiny_hf)
    cg.apply_lora(trained_on, **OPTIONS[options])
    updates = randomise_lora(trained_on, size=0.2)
    opened = peft.PeftModel.from_pretrained(stock, cg.save_adapter(trained_on, tmp_path)).eval()
    wanted = outputs(trained_on)
    assert largest(outputs(opened), wanted) <= 1e-5 * max(1, *(t.abs().max().item() for t in wanted))
    assert sum(p.numel() for name, p in opened.named_parameters() if "lora_" in name) == sum(
        a.numel() + b.numel() for a, b, _ in updates.values()
    )
    with opened.disable_adapter():
        assert largest(outputs(opened), wanted) > 1e-3


def randomise_peft(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "two names": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
    "every module": {"target_modules": ALL_MODULES, "r": 3, "lora_alpha": 5, "use_rslora": True},
    "a regular expression": {"target_modules": r"text_model.*\.(fc1|out_proj)", "r": 2},
    "some layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "r": 2,
    },
    "patterns": {
        "target_modules": ALL_MODULES,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r"vision_model\..*\.fc2": 3},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, "token_embedding": 1},
    },
    "gaussian": {"target_modules": ["fc1"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_stock_peft_adapters_open_here(
    trained_on: nn.Module, tiny_hf: nn.Module, config: str, tmp_path: Path
) -> None:
    """An adapter from PEFT is refused, or computes something else here."""
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), peft.LoraConfig(**PEFT_CONFIGS[config]))
    randomise_peft(stock).save_pretrained(tmp_path)
    adapter = cg.load_adapter(trained_on, tmp_path)
    assert adapter.fingerprint is None
    wanted = outputs(stock)
    assert largest(outputs(trained_on), wanted) <= 1e-5 * max(1, *(t.abs().max().item() for t in wanted))
    cg.disable_lora(trained_on)
    assert largest(outputs(trained_on), wanted) > 1e-3
    again = copy.deepcopy(tiny_hf)
    cg.load_adapter(again, cg.save_adapter(trained_on, tmp_path / "again"))
    assert largest(outputs(again), wanted) <= 1e-5 * max(1, *(t.abs().max().item() for t in wanted))


FOREIGN: dict[str, tuple[Any, str]] = {
    "PiSSA by a random decomposition": (
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4'",
    ),
    "OLoRA": (
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
        "init_lora_weights='olora'",
    ),
    "LoHa": (peft.LoHaConfig(target_modules=["q_proj"]), "is of PEFT type 'LOHA': clipgraft reads 'LORA'"),
    "IA3": (
        peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        "is of PEFT type 'IA3'",
    ),
    "another module": (
        peft.LoraConfig(target_modules=["mlp.0"]),
        "4 weights that are no LoRA on transformers",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_of_adapters_are_refused(tiny_hf: nn.Module, kind: str, tmp_path: Path) -> None:
    """An adapter of another kind loads as plain LoRA and computes something else."""
    config, message = FOREIGN[kind]
    base = copy.deepcopy(tiny_hf)
    if kind == "another module":
        base = nn.Sequential()
        for name in ("one", "two"):
            base.add_module(name, nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4))}))
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(cg.errors.AdapterError, match=message) as caught:
        cg.load_adapter(tiny_hf, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert all(p.requires_grad for p in tiny_hf.parameters())


def test_a_layer_that_is_missing(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """PEFT only warns where a file lacks a layer; here such a file would load as a weaker adapter."""
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), peft.LoraConfig(target_modules=["q_proj", "fc1"]))
    stock.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        name: t for name, t in load_file(path).items() if "text_model.encoder.layers.1.mlp" not in name
    }
    save_file(tensors, path)
    with pytest.raises(
        cg.errors.AdapterError, match=r"lacks 1 of its target sites, text\.1\.fc1: it is incomplete"
    ):
        cg.load_adapter(tiny_hf, tmp_path)
    text_only = {name: tensor for name, tensor in tensors.items() if "text_model.encoder.layers.0" in name}
    save_file(text_only, path)
    with pytest.raises(
        cg.errors.AdapterError, match=r"lacks 2 of its target sites, text\.1\.q, text\.1\.fc1"
    ):
        cg.load_adapter(tiny_hf, tmp_path)


def test_a_tower_that_was_left_out_is_not_missing(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """An adapter trained with PEFT on a text tower alone is refused for lacking the vision tower."""
    stock = randomise_peft(
        peft.get_peft_model(copy.deepcopy(tiny_hf), peft.LoraConfig(target_modules=r"text_model.*q_proj"))
    )
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    cg.load_adapter(tiny_hf, tmp_path)
    assert {site.tower for site in require_lora(tiny_hf).layers} == {"text"}
    assert largest(outputs(tiny_hf), outputs(stock)) <= 1e-5
