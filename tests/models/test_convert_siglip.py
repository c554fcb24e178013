"""SigLIP converted between open_clip and transformers: one fingerprint, the same features, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn
from transformers import AutoModel, Siglip2ImageProcessor, SiglipImageProcessor

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.convert import config_of, to_open_clip, to_transformers
from clipgraft.models.convert_siglip import measure_openclip, measure_transformers, named_config
from clipgraft.models.export import write_model
from clipgraft.models.meta import clip_on_meta
from explicit_lora import largest
from tiny_siglip import build_siglip, build_siglip2, save_siglip, to_openclip
from tiny_towers import build_tower
from weight_places import ids, pixels


def features(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    family = as_clip(model).family
    with torch.no_grad():
        return family.encode_image(model, pixels()), family.encode_text(model, ids())


def test_there_and_back() -> None:
    """A SigLIP that was converted gives other features, or is another base to its adapters."""
    siglip = as_clip(build_siglip())
    there = to_open_clip(siglip)
    back = to_transformers(there)
    assert siglip.fingerprint == there.fingerprint == back.fingerprint
    assert largest(features(there.model), features(siglip.model)) <= 1e-5
    assert largest(features(back.model), features(siglip.model)) == 0
    assert there.model.logit_bias.item() == siglip.model.logit_bias.item()
    hand_made = to_openclip(siglip.model)
    assert largest(features(hand_made), features(there.model)) == 0


def test_sizes_that_the_list_names() -> None:
    """A SigLIP of open_clip's list cannot be written as an open_clip folder after conversion."""
    clip = clip_on_meta("ViT-B-16-SigLIP")
    shape = measure_openclip(clip.model)
    assert named_config(clip.model)["embed_dim"] == shape.dim
    twin = to_transformers(dataclasses.replace(clip, tokenizer=None, preprocess=None))
    assert measure_transformers(twin.model) == shape


def test_a_folder_of_each_library(tmp_path: Path) -> None:
    """A converted SigLIP cannot be opened by the library that it was written for."""
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    clip = cg.load(save_siglip(build_siglip(), tmp_path / "siglip", processor))
    texts = ["w1 w2", "w3, W4_w5"]
    converted = to_open_clip(clip)
    write_model(converted, tmp_path / "hf", "transformers")
    again = cg.load(tmp_path / "hf")
    assert type(AutoModel.from_pretrained(tmp_path / "hf")).__name__ == "SiglipModel"
    assert again.fingerprint == clip.fingerprint
    with torch.no_grad():
        assert largest((again.encode_text(texts),), (clip.encode_text(texts),)) == 0
    write_model(clip, tmp_path / "siglip.pt", "open_clip")
    other = to_openclip(build_siglip())
    open_clip.load_checkpoint(other, str(tmp_path / "siglip.pt"), weights_only=True)
    assert as_clip(other).fingerprint == clip.fingerprint
    with pytest.raises(cg.errors.ModelError, match="no SigLIP of these sizes"):
        config_of(converted)


@pytest.mark.parametrize("model", ["siglip2", "PE"])
def test_what_has_no_twin_is_refused(model: str) -> None:
    """A model that the other library cannot hold is converted into something else."""
    clip = as_clip(build_siglip2() if model == "siglip2" else build_tower(model))
    convert = to_open_clip if model == "siglip2" else to_transformers
    with pytest.raises(cg.errors.ModelError, match="cannot leave its own family"):
        convert(clip)


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """A SigLIP cannot be exported to ONNX, or what cannot be ends in a traceback."""
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    clip = cg.load(save_siglip(build_siglip(), tmp_path / "siglip", processor))
    for form in (clip, to_open_clip(clip)):
        found = write_model(form, tmp_path / form.family.name, "onnx").differences
        assert max(found.values()) < 1e-5
    patches = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    naflex = cg.load(save_siglip(build_siglip2(), tmp_path / "siglip2", patches))
    with pytest.raises(cg.errors.ModelError, match="has to stay in PyTorch"):
        write_model(naflex, tmp_path / "siglip2_onnx", "onnx")
