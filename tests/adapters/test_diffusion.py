"""LoRA of CLIP's text encoder from trainers of image generators acts as it does where it was made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.convert import detect, read_any
from peft_models import outputs
from tiny_models import build_hf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PEFT = "base_model.model."
UNET = {
    "lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2),
    "lora_unet_down_blocks_0.alpha": torch.ones(()),
}


@pytest.fixture
def made(tiny_hf: nn.Module, tmp_path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's LoRA of the text tower at α/r = 2, and its weights by their module paths."""
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, target_modules=rf".*text_model.*({'|'.join(MODULES)})"
    )
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(tiny_hf), config).eval()
    model.save_pretrained(tmp_path / "peft")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    return model, {name.removeprefix(PEFT): tensor for name, tensor in weights.items()}


def kohya(weights: dict[str, Tensor], owner: str = "lora_te", alpha: float | None = 8.0) -> dict[str, Tensor]:
    """The file of kohya's scripts."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        path, _, part = name.partition(".lora_")
        module = f"{owner}_{path.replace('.', '_')}"
        named[f"{module}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        if alpha is not None:
            named[f"{module}.alpha"] = torch.tensor(alpha)
    return named


def same(path: Path, model: nn.Module) -> None:
    """The file on a fresh base computes what PEFT's model does."""
    base = build_hf()
    cg.load_adapter(base, path)
    for ours, theirs in zip(outputs(base), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("owner", ["lora_te", "lora_te1"])
def test_kohya(made: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path, owner: str) -> None:
    """A text encoder from kohya's scripts is scaled wrongly, put on other sites, or refused."""
    model, weights = made
    save_file({**kohya(weights, owner), **UNET}, tmp_path / "a.safetensors")
    assert detect(tmp_path / "a.safetensors") == "kohya"
    same(tmp_path / "a.safetensors", model)


def test_kohya_without_alpha(
    made: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without alphas the scale is guessed without a word."""
    save_file(kohya(made[1], alpha=None), tmp_path / "a.safetensors")
    caplog.set_level("INFO", "clipgraft")
    adapter = read_any(tmp_path / "a.safetensors")
    assert set(adapter.scales.values()) == {1.0}
    assert any("12 sites have no alpha: the rank is taken" in message for message in caplog.messages)


@pytest.mark.parametrize("style", ["peft", "flat", "old", "metadata"])
def test_diffusers(made: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path, style: str) -> None:
    """A text encoder from diffusers, in one of its namings, is scaled wrongly, misplaced, or refused."""
    model, weights = made
    named: dict[str, Tensor] = {"unet.down_blocks.0.lora_A.weight": torch.ones(2, 2)}
    for name, tensor in weights.items():
        path, _, part = name.partition(".lora_")
        if style == "flat":
            path = path.removeprefix("text_model.")
        ending = (
            {"A": "lora_linear_layer.down", "B": "lora_linear_layer.up"}[part[0]] if style == "old" else ""
        )
        named[f"text_encoder.{path}.{ending or f'lora_{part[0]}'}.weight"] = tensor
        if style != "metadata":
            named[f"text_encoder.{path}.alpha"] = torch.tensor(8.0)
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 8})}
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors", metadata if style == "metadata" else None)
    assert detect(tmp_path / "pytorch_lora_weights.safetensors") == "diffusers"
    same(tmp_path / "pytorch_lora_weights.safetensors", model)


def test_what_was_left_out_is_said(
    made: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The image generator's half of a file disappears without a word."""
    save_file({**kohya(made[1]), **UNET}, tmp_path / "a.safetensors")
    caplog.set_level("INFO", "clipgraft")
    read_any(tmp_path / "a.safetensors")
    assert any(
        "took the 36 weights of lora_te; left out 2, of the image generator" in m for m in caplog.messages
    )


def test_two_text_encoders(made: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path) -> None:
    """Of a generator with two text encoders the other one is put on the model."""
    model, weights = made
    deeper = {name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in weights.items()}
    path = tmp_path / "sdxl.safetensors"
    save_file({**kohya(weights, "lora_te1"), **kohya(deeper, "lora_te2")}, path)
    same(path, model)
    with pytest.raises(
        cg.errors.AdapterError, match=r"lora_te1 of 2 blocks, lora_te2 of 8 blocks: say which"
    ):
        read_any(path)


REFUSED = {
    "generator alone": (dict(UNET), "for an image generator alone"),
    "lokr": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1": torch.ones(2, 2)}, "no plain LoRA"),
    "dora": (
        {"text_encoder.text_model.encoder.layers.0.mlp.fc1.dora_scale": torch.ones(2)},
        "diffusers|neither",
    ),
    "half": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)},
        "lacks A or B",
    ),
    "elsewhere": ({"lora_te_text_model_pooler.lora_down.weight": torch.ones(2, 2)}, "no plain LoRA"),
    "peft alone": (
        {"base_model.model.text_projection.lora_A.weight": torch.ones(2, 2)},
        "the folder that holds",
    ),
    "a model": ({"text_projection.weight": torch.ones(2, 2)}, "neither kohya's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str) -> None:
    """A file that is of something else loads in part, or is refused without the name of its format."""
    tensors, told = REFUSED[kind]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(cg.errors.AdapterError, match=told) as caught:
        read_any(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(cg.errors.AdapterError, match="damaged"):
        read_any(tmp_path / "a.safetensors")
