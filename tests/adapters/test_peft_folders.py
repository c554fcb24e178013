"""PEFT's folders as they lie around: old files, adapters of one tower, bases that they name."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from tiny_models import build_hf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605000000\n"
TOWERS = {
    "CLIPTextModel": "text_config",
    "CLIPTextModelWithProjection": "text_config",
    "CLIPVisionModel": "vision_config",
    "CLIPVisionModelWithProjection": "vision_config",
}


def of_tower(kind: str, base: nn.Module, **options: Any) -> PeftModel:
    """PEFT's LoRA on one tower of a CLIPModel, as users of image generators and of retrieval make it."""
    config = copy.deepcopy(getattr(base.config, TOWERS[kind]))
    config.projection_dim = base.config.projection_dim
    tower: nn.Module = getattr(transformers, kind)(config)
    prefix = "text_model." if "Text" in kind else "vision_model."
    state = base.state_dict()
    whole = {name: name if name in state else f"{prefix}{name}" for name in tower.state_dict()}
    tower.load_state_dict({name: state[known] for name, known in whole.items()})
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "init_lora_weights": False,
    }
    torch.manual_seed(2)
    return get_peft_model(tower, LoraConfig(**{**settings, **options})).eval()


def hidden(kind: str, tower: nn.Module) -> torch.Tensor:
    """What a tower computes before its projection."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 98, (3, 16), generator=generator)
    ids[:, 9:] = 99
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        output = tower(input_ids=ids) if "Text" in kind else tower(pixel_values=pixels)
    return output.last_hidden_state


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {r"encoder\.layers\.1\..*": 4}}])
def test_adapters_of_one_tower(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that PEFT made on one tower is refused, or acts on the other tower."""
    base = build_hf()
    model = of_tower(kind, base, **options)
    model.save_pretrained(tmp_path)
    adapted = as_clip(build_hf())
    file = cg.load_adapter(adapted, tmp_path)
    tower = "text" if "Text" in kind else "vision"
    assert {site.tower for site in file.weights} == {tower}
    ours = getattr(adapted.model, f"{tower}_model")
    torch.testing.assert_close(hidden(kind, ours), hidden(kind, model), atol=1e-5, rtol=0)
    other = "vision" if tower == "text" else "text"
    wrong = {"text": "CLIPTextModel", "vision": "CLIPVisionModel"}[other]
    untouched = hidden(wrong, getattr(adapted.model, f"{other}_model"))
    assert untouched.equal(hidden(wrong, getattr(base, f"{other}_model")))


def test_one_tower_without_its_name(tmp_path: Path) -> None:
    """An adapter that does not say which tower it is of is put on one of the two."""
    of_tower("CLIPVisionModel", build_hf()).save_pretrained(tmp_path)
    # Some releases of transformers name the tower in its modules.
    weights = tmp_path / "adapter_model.safetensors"
    bare = {name.replace(".vision_model.", "."): tensor for name, tensor in load_file(weights).items()}
    save_file(bare, weights)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "auto_mapping": None}), encoding="utf-8")
    with pytest.raises(cg.errors.AdapterError, match='"base_model_class": "CLIPTextModel"') as caught:
        cg.read_adapter(tmp_path)
    advised = json.loads("{" + str(caught.value).partition("add to it ")[2].partition(" or ")[0] + "}")
    advised["auto_mapping"]["base_model_class"] = "CLIPVisionModel"
    path.write_text(json.dumps({**config, **advised}), encoding="utf-8")
    assert {site.tower for site in cg.read_adapter(tmp_path).weights} == {"vision"}


@pytest.fixture
def peft_folder(tiny_hf: nn.Module, tmp_path: Path) -> Path:
    """An adapter of PEFT on a CLIPModel."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_hf, config).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_adapter_model_bin(peft_folder: Path, tmp_path: Path) -> None:
    """Folders of PEFT before 0.7, whose weights are in adapter_model.bin, are called no adapter."""
    weights = load_file(peft_folder / "adapter_model.safetensors")
    before = cg.read_adapter(peft_folder)
    (peft_folder / "adapter_model.safetensors").unlink()
    torch.save(weights, peft_folder / "adapter_model.bin")
    for path in (peft_folder, peft_folder / "adapter_model.bin"):
        after = cg.read_adapter(path)
        assert after.weights.keys() == before.weights.keys()
        for site, (a, b) in after.weights.items():
            assert a.equal(before.weights[site][0])
            assert b.equal(before.weights[site][1])


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_adapter_model_bin(peft_folder: Path, tmp_path: Path) -> None:
    """An adapter_model.bin from a stranger runs the stranger's program."""
    (peft_folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil(tmp_path / "trace")}, peft_folder / "adapter_model.bin")
    with pytest.raises(cg.errors.AdapterError, match=r"adapter_model\.bin cannot be read.*never run"):
        cg.read_adapter(peft_folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_git_lfs_pointers(peft_folder: Path, name: str) -> None:
    """A pointer that git-lfs left in place of an adapter's file is called damaged."""
    (peft_folder / name).write_text(POINTER, encoding="utf-8")
    with pytest.raises(cg.errors.AdapterError, match="git-lfs pointer") as caught:
        cg.read_adapter(peft_folder)
    assert name in str(caught.value)


def test_weights_without_their_configuration(peft_folder: Path) -> None:
    """A folder that lacks adapter_config.json alone does not say so."""
    (peft_folder / "adapter_config.json").unlink()
    with pytest.raises(cg.errors.AdapterError, match=r"adapter_model\.safetensors without adapter_config"):
        cg.read_adapter(peft_folder)


def named(folder: Path, base: object) -> Path:
    """The folder with another base in its configuration."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": base}), encoding="utf-8")
    return folder


def test_the_base_that_peft_recorded(
    peft_folder: Path, hf_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`cg.load` of a PEFT folder denies that it names its base, or loads a local folder without a word."""
    clip = cg.load(named(peft_folder, str(hf_folder)))
    assert any(name.startswith("text.0.q.") for name in cg.adapters.lora_state_dict(clip))
    assert f"base {hf_folder} (on this machine), as the adapter {peft_folder} names it" in caplog.messages
    assert clip.fingerprint == cg.load(hf_folder).fingerprint


def test_a_base_of_the_hub(
    peft_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that cannot be fetched is not named, or not said before it is fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(cg.errors.AdapterError, match="hf:owner/some-clip"):
        cg.load(named(peft_folder, "owner/some-clip"))
    assert any(message.startswith("base hf:owner/some-clip (of the") for message in caplog.messages)


@pytest.mark.parametrize("base", [None, "", 3, "a\0b", ["x"]])
def test_no_base(peft_folder: Path, base: object) -> None:
    """A configuration without a base, or with something else in its place, ends in a traceback."""
    with pytest.raises(cg.errors.AdapterError, match="does not say which base"):
        cg.load(named(peft_folder, base))


def test_our_own_adapters_say_their_base(
    hf_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that an adapter's clipgraft.json names is loaded without a word."""
    clip = cg.load(hf_folder)
    cg.apply_lora(clip, r=2)
    cg.save_adapter(clip, tmp_path / "vi")
    caplog.set_level(logging.WARNING)  # what Python shows by itself
    cg.load(tmp_path / "vi")
    assert caplog.messages == [
        f"base {hf_folder} (on this machine), as the adapter {tmp_path / 'vi'} names it"
    ]


def test_layer_norms_to_save(peft_folder: Path) -> None:
    """A layer norm in modules_to_save is said to be unannounced, though the configuration announces it."""
    weights = load_file(peft_folder / "adapter_model.safetensors")
    norm = {"base_model.model.vision_model.post_layernorm.weight": torch.ones(32)}
    save_file({**weights, **norm}, peft_folder / "adapter_model.safetensors")
    path = peft_folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "modules_to_save": ["post_layernorm"]}), encoding="utf-8")
    with pytest.raises(
        cg.errors.AdapterError, match=r"modules_to_save announces, vision_model\.post_layernorm"
    ):
        cg.read_adapter(peft_folder)
