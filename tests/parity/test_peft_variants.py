"""DoRA, biases, whole modules, PiSSA and named folders against stock PEFT, both ways and in both families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from explicit_lora import ROLES, largest, target
from peft_models import ALL_MODULES, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    # PEFT takes the bias of B for a weight of the wrong shape.
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),
]


def randomise_adapter(model: nn.Module) -> None:
    """Random values for all that an adapter of ours trains."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator) * 0.2
            p.data.copy_(p.data * (1 + noise) + 0.1 * noise if "magnitude" in name else p.data + noise)


def randomise_peft(model: nn.Module) -> nn.Module:
    """Random values for all that an adapter of PEFT's trains."""
    randomise_adapter(model)
    return model.eval()


def close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return largest(got, wanted) <= 1e-5 * max(1, *(t.abs().max().item() for t in wanted))


OURS: dict[str, dict[str, Any]] = {
    **{f"DoRA {role}": {"targets": target(role), "use_dora": True} for role in ROLES},
    "DoRA everywhere": {"targets": "all", "use_dora": True, "use_rslora": True},
    "biases of the adapted": {"targets": "text.*.q+out,vision.*.fc1,projection", "bias": "lora_only"},
    "all biases": {"targets": "vision.*.k+fc2", "bias": "all"},
    "all biases, DoRA": {"targets": "all", "bias": "all", "use_dora": True},
    "PiSSA": {"targets": "all", "init": "pissa"},
    "PiSSA, rsLoRA, DoRA": {"targets": "attention", "init": "pissa", "use_rslora": True, "use_dora": True},
    "temperature": {"targets": "attention", "train_logit_scale": True},
}


@pytest.mark.parametrize("options", OURS)
def test_stock_peft_opens_our_variants(
    trained_on: nn.Module,
    tiny_hf: nn.Module,
    options: str,
    tmp_path: Path,
) -> None:
    """A DoRA, bias or PiSSA adapter trained here computes something else in PEFT, or after being loaded."""
    stock, again = copy.deepcopy(tiny_hf), copy.deepcopy(trained_on)
    cg.apply_lora(trained_on, r=3, alpha=4, **OURS[options])
    randomise_adapter(trained_on)
    wanted = outputs(trained_on)
    folder = cg.save_adapter(trained_on, tmp_path / "adapter")
    assert close(outputs(peft.PeftModel.from_pretrained(stock, folder).eval()), wanted)
    cg.load_adapter(again, folder)
    assert close(outputs(again), wanted)
    cg.disable_lora(again)
    assert not close(outputs(again), wanted)


THEIRS: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": ALL_MODULES, "use_dora": True},
    "DoRA, rsLoRA": {"target_modules": ["q_proj", "fc2"], "use_dora": True, "use_rslora": True},
    "biases of the adapted": {"target_modules": ["k_proj", "fc1"], "bias": "lora_only"},
    "all biases": {"target_modules": ["out_proj"], "bias": "all"},
    "biases of B": {"target_modules": ["q_proj", "fc2"], "lora_bias": True},
    "whole projections": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["text_projection", "visual_projection"],
    },
    "whole projections, DoRA": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["visual_projection"],
        "use_dora": True,
    },
    "PiSSA": {"target_modules": ["q_proj", "fc1", "text_projection"], "init_lora_weights": "pissa"},
    "patterns": {
        "target_modules": ["q_proj", "fc1"],
        "rank_pattern": {"text_model.*q_proj": 5},
        "alpha_pattern": {"fc1": 9},
        "use_dora": True,
    },
}


@pytest.mark.parametrize("options", THEIRS)
def test_we_open_peft_variants(
    trained_on: nn.Module,
    tiny_hf: nn.Module,
    options: str,
    tmp_path: Path,
) -> None:
    """An adapter that PEFT trained with one of its options computes something else here, or saved again."""
    pristine = copy.deepcopy(tiny_hf)
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), peft.LoraConfig(r=3, lora_alpha=5, **THEIRS[options]))
    wanted = outputs(randomise_peft(stock))
    stock.save_pretrained(tmp_path)
    reopened = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path).eval()
    assert close(outputs(reopened), wanted)
    cg.load_adapter(trained_on, tmp_path)
    assert close(outputs(trained_on), wanted)
    again = cg.save_adapter(trained_on, tmp_path / "again")
    assert close(outputs(peft.PeftModel.from_pretrained(pristine, again).eval()), wanted)


def test_named_adapters_of_peft_lie_in_subfolders(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """Adapters that PEFT saved under names cannot be found, or the wrong one of them is taken."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), config, adapter_name="cats")
    stock.add_adapter("dogs", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    stock.save_pretrained(tmp_path, selected_adapters=["cats"])
    cg.load_adapter(tiny_hf, tmp_path)
    assert {layer.r for layer in require_lora(tiny_hf).layers.values()} == {2}
    stock.save_pretrained(tmp_path)
    with pytest.raises(cg.errors.AdapterError, match=r"several adapters, cats, dogs: give the folder of one"):
        cg.load_adapter(tiny_hf, tmp_path)
    cg.load_adapter(tiny_hf, tmp_path, name="dogs")
    assert {layer.r for layer in require_lora(tiny_hf).layers.values()} == {4}


def drop(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"use_dora": True}, lambda t: drop(t, "0.self_attn.q_proj.lora_magn"), r"text\.0\.q \(lora_m"),
        ({"bias": "lora_only"}, lambda t: drop(t, "1.self_attn.q_proj.base_layer"), r"layers\.1\.self"),
        ({}, lambda t: {**t, "base_model.model.logit_scale": torch.zeros(())}, "logit_scale"),
        (
            {},
            lambda t: {**t, "base_model.model.text_projection.weight": torch.zeros(24, 32)},
            r"text_projection\.weight",
        ),
        ({}, lambda t: drop(t, "vision_model.encoder.layers.1.self_attn.q_proj"), r"vision\.1\.q"),
    ],
)
def test_missing_and_surplus_keys_are_listed(
    tiny_hf: nn.Module, options: dict[str, Any], change: Any, message: str, tmp_path: Path
) -> None:
    """An incomplete or mixed adapter loads without a word, as it does in PEFT."""
    from safetensors.torch import load_file, save_file

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    peft.get_peft_model(copy.deepcopy(tiny_hf), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(cg.errors.AdapterError, match=message):
        cg.load_adapter(tiny_hf, tmp_path)
    with pytest.raises(cg.errors.AdapterError, match="carries no LoRA"):
        require_lora(tiny_hf)


def test_auto_peft_finds_base_and_class(hf_folder: Path, tmp_path: Path) -> None:
    """`AutoPeftModel` refuses an adapter of ours although it names a base that transformers finds."""
    clip = cg.load(f"hf:{hf_folder}")
    cg.apply_lora(clip, targets="attention")
    randomise_adapter(clip.model)
    opened = peft.AutoPeftModel.from_pretrained(cg.save_adapter(clip, tmp_path)).eval()
    assert close(outputs(opened), outputs(clip.model))
