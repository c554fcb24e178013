"""Weights in every wrapping that people have them in give the model that they were saved from."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.weights_file import read_torchscript
from tiny_models import TINY_OPENCLIP, to_transformers

State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    """The weights under another prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def average(state: State) -> State:
    """Other weights of the same names."""
    return {name: tensor * 0.5 for name, tensor in state.items()}


def compiled(state: State) -> State:
    """One tower compiled, the other not."""
    return {name.replace("visual.", "visual._orig_mod."): tensor for name, tensor in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "model_state_dict": lambda s: {"epoch": 1, "model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "half compiled": compiled,
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2.4"},
    "deeper": lambda s: {"state_dict": prefixed(s, "net.clip.")},
    "with loss": lambda s: {"state_dict": {**prefixed(s, "model."), "criterion.scale": torch.ones(3)}},
    "with teacher": lambda s: {"state_dict": {**prefixed(average(s), "ema."), **prefixed(s, "model.")}},
    "average beside": lambda s: {"state_dict": s, "state_dict_ema": average(s)},
    "average alone": lambda s: {"model_ema": s},
    "swa": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(3)},
    "openai": lambda s: {
        **{name: tensor.half() for name, tensor in s.items()},
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    },
    "transformers": lambda s: _hf_names(s),
    "split text": lambda s: open_clip.model.convert_to_custom_text_state_dict(s),
}


def _hf_names(state: State) -> State:
    model = open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))
    model.load_state_dict(state)
    return dict(to_transformers(model).state_dict())


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_wrappings(tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path, kind: str) -> None:
    """A checkpoint of a usual training loop is refused, or its average is taken for the weights."""
    torch.save(WRAPPINGS[kind](dict(tiny_openclip.state_dict())), tmp_path / "weights.pt")
    clip = cg.load(tiny_config, tmp_path / "weights.pt")
    wanted = tiny_openclip.half().float() if kind == "openai" else tiny_openclip
    assert clip.fingerprint == as_clip(wanted).fingerprint


SAID = {
    "with loss": "left out 1 weights of something else: criterion.scale",
    "with teacher": "weights of something else: ema.",
    "average beside": "took 'state_dict'; the average beside it, 'state_dict_ema', is left out",
    "average alone": "took 'model_ema', the average over steps",
    "lightning": "weights under 'model.'",
    "transformers": "names are transformers'",
}


@pytest.mark.parametrize("kind", SAID)
def test_choices_are_said(
    tiny_openclip: nn.Module,
    tiny_config: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """What was taken and left of a checkpoint with several parts is not said."""
    torch.save(WRAPPINGS[kind](dict(tiny_openclip.state_dict())), tmp_path / "weights.pt")
    cg.load(tiny_config, tmp_path / "weights.pt")
    assert any(SAID[kind] in message and "weights.pt" in message for message in caplog.messages)


def test_a_plain_file_says_nothing(
    tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines about the usual case hide those about an unusual one."""
    torch.save({"state_dict": prefixed(dict(tiny_openclip.state_dict()), "module.")}, tmp_path / "weights.pt")
    cg.load(tiny_config, tmp_path / "weights.pt")
    assert not caplog.messages


def test_split_model_from_plain_weights(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """Weights of a CLIP do not load into the same model with `custom_text`."""
    (tmp_path / "split.json").write_text(json.dumps({**TINY_OPENCLIP, "custom_text": True}), encoding="utf-8")
    torch.save(tiny_openclip.state_dict(), tmp_path / "weights.pt")
    clip = cg.load(tmp_path / "split.json", tmp_path / "weights.pt")
    assert clip.fingerprint == as_clip(tiny_openclip).fingerprint


def test_transformers_folder_with_open_clips_names(
    tiny_hf: nn.Module, hf_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A transformers folder whose weights were saved from open_clip is refused, or loads in part."""
    from peft_models import to_openclip

    folder = tmp_path / "folder"
    shutil.copytree(hf_folder, folder)
    save_file(dict(to_openclip(tiny_hf).state_dict()), folder / "model.safetensors")
    assert cg.load(folder).fingerprint == as_clip(tiny_hf).fingerprint
    assert any("names are open_clip's" in message for message in caplog.messages)


def test_wrapped_weights_in_a_folder(tiny_hf: nn.Module, hf_folder: Path, tmp_path: Path) -> None:
    """A folder whose weights were saved from a wrapped model, in a .bin file, or in shards, is refused."""
    folder = tmp_path / "folder"
    shutil.copytree(hf_folder, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(prefixed(state, "model."), folder / "pytorch_model.bin")
    assert cg.load(folder).fingerprint == as_clip(tiny_hf).fingerprint
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
    for part in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: state[name] for name in state if places[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    assert cg.load(folder).fingerprint == as_clip(tiny_hf).fingerprint
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, "../part-0.safetensors")}))
    with pytest.raises(cg.errors.ModelError, match="outside its folder"):
        cg.load(folder)


def test_lora_in_a_base(tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path) -> None:
    """A checkpoint with LoRA in it loads as a base without it."""
    clip = as_clip(tiny_openclip)
    cg.apply_lora(clip, r=2)
    torch.save(clip.model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(cg.errors.ModelError, match="holds LoRA beside the base"):
        cg.load(tiny_config, tmp_path / "weights.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_archives(tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path, how: str) -> None:
    """OpenAI's original downloads, which are archives of compiled models, cannot be used."""
    path = tmp_path / "archive.pt"
    if how == "script":
        torch.jit.save(torch.jit.script(tiny_openclip), path)
    else:
        inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)
        torch.jit.save(torch.jit.trace(tiny_openclip, inputs, check_trace=False), path)
    assert cg.load(tiny_config, path).fingerprint == as_clip(tiny_openclip).fingerprint
    stored = read_torchscript(path)
    for name, tensor in tiny_openclip.state_dict().items():
        assert stored[name].equal(tensor)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_openai_archive_under_another_activation(
    tiny_openclip: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenAI's weights run with GELU instead of QuickGELU, and every feature is a little wrong."""
    torch.jit.save(torch.jit.script(tiny_openclip), tmp_path / "archive.pt")
    (tmp_path / "gelu.json").write_text(json.dumps({**TINY_OPENCLIP, "quick_gelu": False}), encoding="utf-8")
    cg.load(tmp_path / "gelu.json", tmp_path / "archive.pt")
    assert any("-quickgelu" in message for message in caplog.messages)


def resized(**changes: dict[str, int]) -> dict[str, Any]:
    """The tiny configuration with other settings of its towers."""
    config = copy.deepcopy(TINY_OPENCLIP)
    for tower, settings in changes.items():
        config[tower] |= settings
    return config


def test_other_image_size_is_said(
    tiny_openclip: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Image positions are interpolated without a word, and the features are not the model's own."""
    torch.save(tiny_openclip.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "large.json").write_text(json.dumps(resized(vision_cfg={"image_size": 48})))
    clip = cg.load(tmp_path / "large.json", tmp_path / "weights.pt")
    assert any("4×4 patches" in message and "6×6" in message for message in caplog.messages)
    stock = open_clip.CLIP(**resized(vision_cfg={"image_size": 48}))
    open_clip.load_checkpoint(stock, str(tmp_path / "weights.pt"))
    assert clip.fingerprint == as_clip(stock).fingerprint


@pytest.mark.parametrize("length", [32, 90])
def test_other_context_is_refused(tiny_openclip: nn.Module, tmp_path: Path, length: int) -> None:
    """Text positions are stretched without a word, which changes the features of every caption."""
    torch.save(tiny_openclip.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "other.json").write_text(json.dumps(resized(text_cfg={"context_length": length})))
    with pytest.raises(cg.errors.ModelError, match=f"has 77 positions and this model {length}"):
        cg.load(tmp_path / "other.json", tmp_path / "weights.pt")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605000000\n"


def test_git_lfs_pointers(hf_folder: Path, tiny_config: Path, tmp_path: Path) -> None:
    """A pointer that git-lfs left in place of a file is called damaged, or too large a header."""
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_text(POINTER, encoding="utf-8")
        with pytest.raises(cg.errors.ModelError, match="git-lfs pointer"):
            cg.load(tiny_config, tmp_path / name)
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(hf_folder, folder)
        (folder / name).write_text(POINTER, encoding="utf-8")
        with pytest.raises(cg.errors.ModelError, match="git-lfs pointer") as caught:
            cg.load(folder)
        assert name in str(caught.value)


def test_a_model_that_was_saved_alone(tiny_hf: nn.Module, hf_folder: Path, tmp_path: Path) -> None:
    """`model.save_pretrained` alone makes a folder whose missing files nobody names."""
    tiny_hf.save_pretrained(tmp_path / "bare")
    with pytest.raises(cg.errors.ModelError) as caught:
        cg.load(tmp_path / "bare")
    assert "tokenizer.json" in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)
    from transformers import CLIPImageProcessor, CLIPTokenizerFast

    for kind in (CLIPImageProcessor, CLIPTokenizerFast):  # what the message says to do
        kind.from_pretrained(hf_folder).save_pretrained(tmp_path / "bare")
    assert cg.load(tmp_path / "bare").fingerprint == as_clip(tiny_hf).fingerprint
