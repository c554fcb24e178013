"""What cannot be loaded ends with one clear line, is never half loaded, and never runs its code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.models import load_hf


def refusal(*arguments: Any, **keywords: Any) -> str:
    """The message of the ModelError that loading ends with; always one line."""
    with pytest.raises(cg.errors.ModelError) as caught:
        cg.load(*arguments, **keywords)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def save_pt(state: dict[str, Tensor], folder: Path) -> Path:
    """A plain state dict."""
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def test_tags_in_open_clips_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag that open_clip takes, with dashes or capitals, is called unknown."""
    fetched: list[object] = []

    def download(config: dict[str, Any]) -> str:
        fetched.append(config["hf_hub"])
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("ViT-B-32", "LAION2B-s34b-b79k")
    assert fetched == ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K/"]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_checkpoints_never_runs(tiny_config: Path, tmp_path: Path) -> None:
    """A checkpoint from a stranger runs the stranger's program."""
    trace, path = tmp_path / "trace", tmp_path / "weights.pt"
    evil = Evil(trace)
    torch.save({"state_dict": {"logit_scale": evil}}, path)
    assert "never run" in refusal(tiny_config, path)
    torch.save({"state_dict": {}, "args": evil}, path)
    assert "never run" in refusal(tiny_config, path)
    path.write_bytes(pickle.dumps(evil))
    assert "never run" in refusal(tiny_config, path)
    assert not trace.exists()


def test_code_in_hf_folders_never_runs(hf_folder: Path, tmp_path: Path) -> None:
    """A model folder from a stranger runs the stranger's program."""
    trace, folder = tmp_path / "trace", tmp_path / "pickled"
    shutil.copytree(hf_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Evil(trace)}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read as weights of a transformers CLIP folder" in refusal(folder)
    custom = tmp_path / "custom"
    shutil.copytree(hf_folder, custom)
    (custom / "own.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Own: ...\n", encoding="utf-8")
    (custom / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}),
        encoding="utf-8",
    )
    cg.load(custom)  # its tokenizer.json needs no code
    (custom / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(custom)
    assert not trace.exists()


def truncated(path: Path, state: dict[str, Tensor]) -> None:
    """Half of a download."""
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


DAMAGES: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "half.pt": truncated,
    "half.safetensors": truncated,
    "empty.pt": lambda path, _: path.write_bytes(b""),
    "empty.safetensors": lambda path, _: path.write_bytes(b""),
    "page.pt": lambda path, _: path.write_text("<html>404</html>", encoding="utf-8"),
    "noise.pt": lambda path, _: path.write_bytes(np.random.default_rng(0).bytes(999)),
    "nothing.pt": lambda path, _: torch.save({}, path),
    "tensor.pt": lambda path, _: torch.save(torch.ones(2), path),
    "list.pt": lambda path, _: torch.save([1, 2], path),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path, name: str) -> None:
    """A broken download ends with a traceback instead of the name of the file to fetch again."""
    DAMAGES[name](tmp_path / name, tiny_openclip.state_dict())
    message = refusal(tiny_config, tmp_path / name)
    assert message.startswith(f"{tmp_path / name} cannot be read as weights of {tiny_config}: it is damaged")


def test_checkpoint_of_another_architecture(
    tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path
) -> None:
    """Weights of another model load half way, or fail without saying which weight does not fit."""
    state = tiny_openclip.state_dict()
    message = refusal(tiny_config, save_pt({**state, "visual.proj": torch.ones(3, 3)}, tmp_path))
    assert "visual.proj" in message
    assert "`model`" in message
    del state["text_projection"]
    assert "text_projection" in refusal(tiny_config, save_pt(state, tmp_path))


def test_torchscript_archive(tiny_config: Path, tmp_path: Path) -> None:
    """OpenAI's original downloads are refused without saying why or what to do."""
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (
            ("constants.pkl", b"\x80\x02)."),
            ("data.pkl", b"\x80\x02N."),
            ("version", b"3\n"),
        ):
            archive.writestr(f"clip/{name}", content)
    message = refusal(tiny_config, path)
    assert "TorchScript archive" in message
    assert "state_dict()" in message


CONFIGS: dict[str, tuple[str, str]] = {
    "broken": ("{", "not readable JSON"),
    "list": ("[]", "lacks embed_dim, vision_cfg, text_cfg"),
    "half": ('{"embed_dim": 8, "text_cfg": {}}', "lacks vision_cfg"),
    "nested": ('{"model_cfg": {"embed_dim": 8}}', "lacks vision_cfg, text_cfg"),
    "flat": ('{"embed_dim": 8, "text_cfg": 3, "vision_cfg": "ViT"}', "vision_cfg and text_cfg must be"),
    "unknown": ('{"embed_dim": 8, "text_cfg": {"colour": 1}, "vision_cfg": {}}', "colour"),
    "hugging": ('{"model_type": "clip", "projection_dim": 8}', "lacks embed_dim"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_faulty_configs(tmp_path: Path, kind: str) -> None:
    """A fault in a JSON model config ends with a traceback out of open_clip."""
    content, expected = CONFIGS[kind]
    (tmp_path / "model.json").write_text(content, encoding="utf-8")
    message = refusal(tmp_path / "model.json", "none")
    assert str(tmp_path / "model.json") in message
    assert expected in message


def test_wrong_names() -> None:
    """A typing error in a name, tag or path gives no hint at what was meant."""
    assert "did you mean ViT-B-32 or" in refusal("ViT-B32", "openai")
    assert "did you mean ViT-B-32 or" in refusal("vit-b-32", "openai")
    assert "did you mean openai?" in refusal("ViT-B-32", "openia")
    assert "known tags: openai, laion400m_e31" in refusal("ViT-B-32", "qqq")
    assert "hf:openai/clip-vit-base-patch32" in refusal("openai/clip-vit-base-patch32")
    assert "did you mean emoji" in refusal("emoij")
    assert "laion2b_s34b_b79k" in refusal("ViT-B-32")
    assert "there is no such file" in refusal("ViT-B-32", "gone.pt")
    assert "there is no such file" in refusal("gone.json", "none")
    assert "hf:owner/name" in refusal("hf:")
    assert "there is no such folder" in refusal("hf:./gone/folder")
    assert "fp32, bf16, fp16" in refusal("emoji", precision="int8")


def test_checkpoint_without_architecture(tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path) -> None:
    """A checkpoint given as the model, or a config without weights, does not say what is missing."""
    assert "`model='ViT-B-32'` and `pretrained=" in refusal(save_pt(tiny_openclip.state_dict(), tmp_path))
    assert "'none' for random weights" in refusal(tiny_config)
    assert "a JSON config has no tags" in refusal(tiny_config, "openai")


def test_weights_are_not_given_twice(hf_folder: Path) -> None:
    """`--pretrained` beside a model that has its own weights is silently ignored."""
    for name in ("emoji", hf_folder, f"hf:{hf_folder}", "hf-hub:owner/name"):
        assert "leave out `pretrained` openai" in refusal(name, "openai")


def test_incomplete_folders(hf_folder: Path, tmp_path: Path) -> None:
    """A folder without some weights, or without its tokenizer, loads with random or empty ones instead."""
    assert "neither config.json" in refusal(tmp_path)
    assert "has no config.json" in refusal(f"hf:{tmp_path}")

    def without(name: str) -> Path:
        folder = tmp_path / f"without-{name}"
        shutil.copytree(hf_folder, folder)
        (folder / name).unlink()
        return folder

    assert "cannot be read" in refusal(without("model.safetensors"))
    assert "has no tokenizer" in refusal(without("tokenizer.json"))
    assert "preprocessor_config.json" in refusal(without("preprocessor_config.json"))
    folder = tmp_path / "without-model.safetensors"
    weights = load_file(hf_folder / "model.safetensors")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    save_file({n: t for n, t in weights.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    assert f"lacks 1 of the model's weights, such as {name}" in refusal(folder)
    save_file({**weights, name: torch.ones(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    assert "cannot be read" in refusal(folder)


def test_a_configuration_that_lost_a_tower_is_refused_unbuilt(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fills in a tower of its default size, maybe of gigabytes, before it looks at weights."""
    folder = tmp_path / "model"
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    devices: list[str] = []

    def put(model: nn.Module, *rest: Any) -> list[str]:
        devices.append(next(model.parameters()).device.type)
        return original(model, *rest)

    original = load_hf._put
    monkeypatch.setattr(load_hf, "_put", put)
    assert f"cannot be read as weights of {folder}" in refusal(folder)
    assert devices == ["meta"]


def test_foreign_folders(hf_folder: Path, tmp_path: Path) -> None:
    """Another kind of model, or a tokenizer of another model, is loaded as if it were right."""
    blip = tmp_path / "blip"
    shutil.copytree(hf_folder, blip)
    (blip / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    assert "'blip' model" in refusal(blip)
    (blip / "config.json").write_text('{"model_type": "a\\nb"}', encoding="utf-8")
    assert "\n" not in refusal(blip)
    (blip / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in refusal(blip)
    other = tmp_path / "other"
    shutil.copytree(hf_folder, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["elephant</w>"] = 100
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "not of one model" in refusal(other)


def test_openclip_folder_without_weights(tiny_config: Path, tmp_path: Path) -> None:
    """An open_clip folder whose weights are missing starts with random ones."""
    whole = {"model_cfg": json.loads(tiny_config.read_text(encoding="utf-8"))}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole), encoding="utf-8")
    assert "pretrained weights" in refusal(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{", encoding="utf-8")
    assert str(tmp_path) in refusal(tmp_path)


def test_adapter_whose_base_is_gone(hf_folder: Path, tmp_path: Path) -> None:
    """An adapter whose base was moved does not say which base it needs and how to go on."""
    shutil.copytree(hf_folder, tmp_path / "base")
    clip = cg.load(tmp_path / "base")
    cg.apply_lora(clip, r=2)
    cg.save_adapter(clip, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(cg.errors.AdapterError) as caught:
        cg.load(tmp_path / "adapter")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert clip.fingerprint in message
    assert str(tmp_path / "base") in message
    assert "load it from there and then load_adapter" in message
