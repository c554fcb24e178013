"""One tower of CLIP alone: it stays as it is, and takes adapters that were made elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

import clipgraft as cg
from clipgraft.models.clip import as_clip
from explicit_lora import bound, largest, randomise_lora
from tiny_dual import build, ids_of
from tiny_models import randomise
from weight_places import pixels

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection")
VISION = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


def whole_with(tower: nn.Module, name: str) -> nn.Module:
    """A `CLIPModel` that holds the weights of a tower."""
    text, vision = build(TEXT[1]).config, build(VISION[1]).config
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim
    )
    torch.manual_seed(1)
    model = randomise(CLIPModel(config)).eval()
    prefix = "" if "Projection" in name else "text_model." if "Text" in name else "vision_model."
    state = {f"{prefix}{key}": weight for key, weight in tower.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


def features(model: nn.Module, name: str) -> torch.Tensor:
    """What the tower pools, of a tower alone or of the same one in a whole model."""
    inner = model
    if hasattr(model, "logit_scale") or "Projection" in name:
        inner = model.text_model if "Text" in name else model.vision_model
    with torch.no_grad():
        if "Text" in name:
            return inner(input_ids=ids_of(name)).pooler_output
        return inner(pixel_values=pixels()).pooler_output


@pytest.mark.parametrize("name", [*TEXT, *VISION])
def test_adapters_go_between_a_tower_and_the_whole(name: str, tmp_path: Path) -> None:
    """An adapter of CLIP's text encoder cannot be used in an image generator, or the other way around."""
    tower = build(name)
    whole, tower_again = whole_with(tower, name), copy.deepcopy(tower)
    targets = "text.*.*" if "Text" in name else "vision.*.*"
    cg.apply_lora(whole, r=2, alpha=6, targets=targets, bias="lora_only")
    randomise_lora(whole, size=0.1)
    cg.load_adapter(tower, cg.save_adapter(whole, tmp_path / "whole"), force=True)
    wanted = features(whole, name)
    assert largest((features(tower, name),), (wanted,)) <= bound((wanted,))
    assert largest((features(tower_again, name),), (wanted,)) > 1e-3
    back = whole_with(tower_again, name)
    cg.load_adapter(back, cg.save_adapter(tower, tmp_path / "tower"), force=True)
    assert largest((features(back, name),), (wanted,)) <= bound((wanted,))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("trainer", ["kohya", "diffusers"])
def test_adapters_of_image_generators(name: str, trainer: str, tmp_path: Path) -> None:
    """LoRA of kohya or diffusers acts otherwise in the text encoder alone than where it was made."""
    tower = build(name)
    modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules)
    torch.manual_seed(3)
    peft = get_peft_model(copy.deepcopy(tower), config).eval()
    weights = {}
    for path, module in peft.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        inside = path if path.startswith("text_model.") else f"text_model.{path}"
        a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        if trainer == "kohya":
            stem = f"lora_te_{inside.replace('.', '_')}"
            weights |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
            weights[f"{stem}.alpha"] = torch.tensor(8.0)
        else:
            stem = f"text_encoder.{inside}"
            weights |= {
                f"{stem}.lora_A.weight": a,
                f"{stem}.lora_B.weight": b,
                f"{stem}.alpha": torch.tensor(8.0),
            }
    save_file({key: tensor.clone() for key, tensor in weights.items()}, tmp_path / "a.safetensors")
    cg.load_adapter(tower, tmp_path / "a.safetensors")
    wanted = features(peft.base_model.model, name)
    assert largest((features(tower, name),), (wanted,)) <= bound((wanted,))
    assert largest((features(build(name), name),), (wanted,)) > 1e-3


@pytest.mark.parametrize("name", [*TEXT, *VISION])
def test_a_tower_gets_no_new_weights(name: str) -> None:
    """A tower that was adapted and freed again is saved with a temperature that it never had."""
    tower = build(name)
    keys = list(tower.state_dict())
    clip = as_clip(tower)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    cg.apply_lora(clip, r=2, targets="linear")
    cg.merge_lora(clip)
    cg.remove_lora(clip, keep_merged=True)
    assert list(tower.state_dict()) == keys
    assert "logit_scale" not in dict(tower.named_parameters())
