"""SigLIP converted between open_clip and transformers: one fingerprint, the same features, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from tokenizers import processors
from torch import nn
from transformers import AutoModel, GemmaTokenizer, Siglip2ImageProcessor, SiglipImageProcessor

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.convert import config_of, to_open_clip, to_transformers
from clipgraft.models.convert_siglip import measure_openclip, measure_transformers, named_config
from clipgraft.models.export import write_model
from clipgraft.models.meta import clip_on_meta
from clipgraft.models.processors import OpenClipTokenizer
from explicit_lora import largest
from tiny_models import randomise
from tiny_siglip import build_siglip, build_siglip2, save_siglip, to_openclip
from tiny_towers import build_tower
from weight_places import ids, pixels

SIGLIP2_SETTINGS = ("no_causal_mask", "proj_bias", "pool_type", "norm_kwargs", "act_kwargs")


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


@pytest.mark.parametrize(
    ("model", "why"),
    [("siglip2", r"patches \(NaFlex\).*of one image size is a SiglipModel"), ("PE", "not CLIP's own")],
)
def test_what_has_no_twin_is_refused(model: str, why: str) -> None:
    """A model that the other library cannot hold is converted into something else."""
    clip = as_clip(build_siglip2() if model == "siglip2" else build_tower(model))
    convert = to_open_clip if model == "siglip2" else to_transformers
    with pytest.raises(cg.errors.ModelError, match=f"cannot leave its own family.*{why}"):
        convert(clip)


def gemma(folder: Path) -> Path:
    """A tokenizer of Gemma's kind: pieces that begin with a mark for the space, and bytes for all else."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_, *"▁aelmnpu", "la", "▁la"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = GemmaTokenizer(vocabulary, [("l", "a"), ("▁", "la")], padding_side="right")
    ends = [("<eos>", 1)]
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=ends)
    inner.save_pretrained(folder)
    return folder


def test_siglip2_of_one_size(tmp_path: Path) -> None:
    """open_clip's SigLIP 2, with Gemma's tokenizer, cannot go to transformers, or comes back changed."""
    listed = open_clip.get_model_config("ViT-B-16-SigLIP2")
    kept = {name: listed["text_cfg"][name] for name in SIGLIP2_SETTINGS}
    text = {**kept, "context_length": 16, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model = open_clip.CustomTextCLIP(32, vision, text, init_logit_bias=listed["init_logit_bias"])
    model.visual = build_tower("SigLIP").visual
    randomise(model).eval()
    cleaning = listed["text_cfg"]["tokenizer_kwargs"]
    tokenizer = OpenClipTokenizer(HFTokenizer(str(gemma(tmp_path)), context_length=16, **cleaning), 16)
    clip = dataclasses.replace(as_clip(model), tokenizer=tokenizer)
    there = to_transformers(clip)
    back = to_open_clip(there)
    assert type(there.model).__name__ == "SiglipModel"
    assert there.model.config.text_config.hidden_act == "gelu_pytorch_tanh"
    assert there.model.config.vision_config.hidden_act == "gelu"
    assert there.model.config.text_config.pad_token_id == 0
    assert clip.fingerprint == there.fingerprint == back.fingerprint
    texts = ["La, lá_la!", "LAMPE", "một con mèo 😀", "la " * 30]
    wanted = clip.tokenize(texts)
    assert int(wanted[1, -1]) == 0
    assert wanted.equal(there.tokenize(texts))
    assert wanted.equal(back.tokenize(texts))
    with torch.no_grad():
        image, text_features = model.encode_image(pixels()), model.encode_text(wanted)
        for other in (there, back):
            given = other.encode_image(pixels()), other.encode_text(texts)
            assert largest(given, (image, text_features)) <= 1e-5


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """A SigLIP cannot be exported to ONNX."""
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    clip = cg.load(save_siglip(build_siglip(), tmp_path / "siglip", processor))
    for form in (clip, to_open_clip(clip)):
        found = write_model(form, tmp_path / form.family.name, "onnx").differences
        assert max(found.values()) < 1e-5


def test_onnx_of_patches(tmp_path: Path) -> None:
    """SigLIP 2 cannot be exported, or gives images of other shapes other features in ONNX Runtime."""
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model = build_siglip2()
    clip = cg.load(save_siglip(model, tmp_path / "model", processor))
    write_model(clip, tmp_path / "onnx", "onnx")
    told = json.loads((tmp_path / "onnx" / "clipgraft_onnx.json").read_text(encoding="utf-8"))["vision"]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / told["file"])
    generator = np.random.default_rng(0)
    for sizes in ([(40, 90)], [(90, 40), (64, 64), (17, 200), (8, 8), (300, 300)]):
        photos = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        given = processor(photos, return_tensors="pt")
        inputs = {told["input"]: given["pixel_values"], told["shapes_input"]: given["spatial_shapes"]}
        (features,) = session.run([told["output"]], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            wanted = model.get_image_features(**given).pooler_output
        assert largest((torch.from_numpy(features),), (wanted,)) < 1e-4
        with torch.no_grad():
            assert largest((clip.encode_image(photos),), (wanted,)) < 1e-4
    assert told["max_num_patches"] == 16
