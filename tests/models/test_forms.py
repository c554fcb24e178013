"""Each form of a merged model is opened by what it is for, and computes what the model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

import clipgraft as cg
from clipgraft.data.datasets import Pairs
from clipgraft.data.reader import read_pairs
from clipgraft.evaluate.graph_gate import GraphGate
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.convert import to_transformers
from clipgraft.models.export import write_model
from clipgraft.models.forms import openvino as ir
from clipgraft.models.forms import text_encoder
from tiny_models import randomise
from tiny_siglip import build_siglip

TEXTS = ["a photo of a cat", "the  Mat of 2 cats", "word " * 100, ""]
PHOTOS = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).filter(
        ImageFilter.GaussianBlur(2)
    )
    for seed, size in enumerate([(50, 100, 3), (64, 41, 3), (32, 32, 3)])
]


@pytest.fixture(params=["open_clip", "transformers"])
def clip(request: pytest.FixtureRequest, tiny_config: Path, hf_folder: Path) -> Clip:
    """A tiny model of each library."""
    if request.param == "transformers":
        return cg.load(hf_folder)
    found = cg.load(tiny_config, "none")
    randomise(found.model)
    return found


def unit(features: Tensor) -> np.ndarray[Any, Any]:
    return F.normalize(features.detach().float(), dim=-1).numpy()


def images_of(clip: Clip) -> np.ndarray[Any, Any]:
    prepare = clip.require_preprocess()
    return unit(clip.encode_image(torch.stack([prepare(photo) for photo in PHOTOS])))


def largest(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def test_sentence_transformers_gives_the_same_vectors(clip: Clip, tmp_path: Path) -> None:
    """A folder for sentence-transformers does not open, or searches in another space than clipgraft."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    write_model(clip, tmp_path / "model", "sentence-transformers", progress=False)
    model = sentence_transformers.SentenceTransformer(
        str(tmp_path / "model"), device="cpu", local_files_only=True
    )
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    assert largest(model.encode(TEXTS, **options), unit(clip.encode_text(TEXTS))) < 1e-5
    # transformers resizes with other rounding than open_clip: the same images, prepared by transformers.
    assert largest(model.encode(PHOTOS, **options), images_of(to_transformers(clip))) < 1e-5
    assert largest(model.encode(PHOTOS, **options), images_of(clip)) < 0.02


def test_immich_finds_what_it_asks_for(clip: Clip, tmp_path: Path) -> None:
    """Immich cannot load a model in its cache, or finds other photos than the model does."""
    folder = tmp_path / "ViT-B-32__openai"
    written = write_model(clip, folder, "immich", progress=False)
    assert max(written.differences.values()) < 1e-5
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "textual" / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    length, pad = told["text_cfg"]["context_length"], names["pad_token"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    textual = onnxruntime.InferenceSession(folder / "textual" / "model.onnx")
    wanted = unit(clip.encode_text(TEXTS))
    for text, expected in zip(TEXTS, wanted, strict=True):
        ids = np.array([tokenizer.encode(" ".join(text.split())).ids], dtype=np.int32)
        assert largest(textual.run(None, {"text": ids})[0][0], expected) < 1e-5
    visual = onnxruntime.InferenceSession(folder / "visual" / "model.onnx")
    settings = json.loads((folder / "visual" / "preprocess_cfg.json").read_text(encoding="utf-8"))
    for photo, expected in zip(PHOTOS, images_of(clip), strict=True):
        pixels = as_immich_prepares(photo, settings)
        assert largest(visual.run(None, {"image": pixels})[0][0], expected) < 0.02


def as_immich_prepares(photo: Image.Image, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Shorter side to `size`, the middle cut out, channels scaled: what `preprocess_cfg.json` means."""
    size = settings["size"]
    assert settings["resize_mode"] == "shortest"
    ratio = size / min(photo.size)
    resized = photo.resize(
        (int(photo.width * ratio), int(photo.height * ratio)),
        Image.Resampling[settings["interpolation"].upper()],
    )
    left, upper = (resized.width - size) // 2, (resized.height - size) // 2
    cut = np.asarray(resized.crop((left, upper, left + size, upper + size)), dtype=np.float32) / 255
    scaled = (cut - np.float32(settings["mean"])) / np.float32(settings["std"])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def test_openvino_gives_the_same_features(hf_folder: Path, tmp_path: Path) -> None:
    """An IR does not open in OpenVINO, takes one batch size, or computes other features."""
    clip = cg.load(hf_folder)
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    written = write_model(clip, tmp_path / "model", "openvino", progress=False)
    assert max(written.differences.values()) < 1e-5
    told = json.loads((tmp_path / "model" / ir.DESCRIPTION).read_text(encoding="utf-8"))
    assert told["format"] == "clipgraft-openvino"
    core = openvino.Core()
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, *clip.family.image_size(clip.model))
        ids = clip.tokenize(TEXTS[:batch])
        with torch.no_grad():
            wanted = {"vision": clip.encode_image(pixels), "text": clip.family.encode_text(clip.model, ids)}
        for tower, given in (("vision", pixels), ("text", ids)):
            graph = core.compile_model(tmp_path / "model" / told[tower]["file"], "CPU", told["checked_with"])
            got = graph({told[tower]["input"]: given.numpy()})[told[tower]["output"]]
            assert largest(got, wanted[tower].numpy()) < 1e-5 * float(wanted[tower].abs().max())


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Three photos with a caption each."""
    lines = ["filepath\ttitle"]
    for index, (photo, text) in enumerate(zip(PHOTOS, ["a cat", "the mat", "2 dogs"], strict=True)):
        photo.save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png\t{text}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    return read_pairs(tmp_path / "pairs.tsv", progress=False)


def test_int8_passes_a_gate_and_says_what_it_lost(
    hf_folder: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 is shipped without anybody knowing what it lost, finds nothing any more, or is no int8 at all."""
    clip = cg.load(hf_folder)
    with pytest.raises(cg.errors.ModelError, match="nothing to measure it on"):
        write_model(clip, tmp_path / "model", "onnx-int8", progress=False)
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    gate = GraphGate(clip, pairs, 100.0, "pairs.tsv", workers=0)
    folder = tmp_path / "model"
    write_model(clip, folder, "onnx-int8", progress=False, gate=gate)
    told = json.loads((folder / "clipgraft_onnx.json").read_text(encoding="utf-8"))
    assert told["recall"]["captions"] == 3
    assert told["recall"]["fp32"].keys() == told["recall"]["int8"].keys()
    products = {node.op_type for node in onnx.load(folder / "text.onnx").graph.node}
    assert "MatMulInteger" in products
    ids = clip.tokenize(TEXTS)
    (got,) = onnxruntime.InferenceSession(folder / "text.onnx").run(None, {"input_ids": ids.numpy()})
    cosines = (unit(torch.from_numpy(got)) * unit(clip.encode_text(TEXTS))).sum(-1)
    assert 0.98 < cosines.min() < 1 - 1e-7
    assert sorted(path.name for path in folder.glob("*.onnx*")) == ["text.onnx", "vision.onnx"]
    exact = torch.eye(3)
    features = iter([(exact, exact), (exact, exact.roll(1, 0))])
    monkeypatch.setattr(GraphGate, "_features", lambda *_: next(features))
    message = r"int8 loses 100\.00 points of recall.*R@1 is 0\.0 % instead of 100\.0 % on 3 captions"
    with pytest.raises(cg.errors.ConfigError, match=message):
        GraphGate(clip, pairs)(folder)


def hidden(clip: Clip, ids: Tensor) -> Tensor:
    """Last hidden states of the text tower, by the library's own forward."""
    twin: Any = to_transformers(clip).model
    with torch.no_grad():
        states: Tensor = twin.text_model(input_ids=ids).last_hidden_state
    return states


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_diffusers_finds_a_text_encoder(kind: Any, clip: Clip, tmp_path: Path) -> None:
    """A pipeline cannot load the text encoder as either class, or draws from other hidden states."""
    write_model(clip, tmp_path / "model", "diffusers", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    given = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt", max_length=16)
    encoder, notes = kind.from_pretrained(
        tmp_path / "model", subfolder="text_encoder", output_loading_info=True
    )
    assert not notes["missing_keys"]
    with torch.no_grad():
        told = encoder.eval()(input_ids=given["input_ids"])
    assert largest(told.last_hidden_state, hidden(clip, given["input_ids"])) < 1e-5
    if kind is CLIPTextModelWithProjection:
        with torch.no_grad():
            wanted = clip.family.encode_text(clip.model, given["input_ids"])
        assert largest(told.text_embeds, wanted) < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "model/tokenizer").iterdir()}


def test_comfyui_finds_its_keys(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI takes the file for another encoder, or draws from other hidden states."""
    config = json.loads(tiny_config.read_text(encoding="utf-8")) | {"embed_dim": 32}
    (tmp_path / "square.json").write_text(json.dumps(config), encoding="utf-8")
    clip = cg.load(tmp_path / "square.json", "none")
    randomise(clip.model)
    with pytest.raises(cg.errors.ModelError, match="ComfyUI has text encoders of the shapes of ViT-L-14"):
        write_model(clip, tmp_path / "clip_l.safetensors", "comfyui", progress=False)
    monkeypatch.setitem(text_encoder.COMFYUI_ENCODERS, "clip_l", (2, 32, 2, 128, "quick_gelu"))
    write_model(clip, tmp_path / "clip_l.safetensors", "comfyui", progress=False)
    state = load_file(tmp_path / "clip_l.safetensors")
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in state  # by which ComfyUI knows it
    stock = CLIPTextModelWithProjection(to_transformers(clip).model.config.text_config).eval()
    assert stock.load_state_dict(state, strict=True)
    ids = clip.tokenize(TEXTS)
    with torch.no_grad():
        told = stock(input_ids=ids)
        assert largest(told.text_embeds, clip.family.encode_text(clip.model, ids)) < 1e-4
    assert largest(told.last_hidden_state, hidden(clip, ids)) < 1e-5


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("sentence-transformers", "sentence-transformers opens CLIP here, and this model is a SiglipModel"),
        ("diffusers", "image generators take the text encoder of CLIP"),
    ],
)
def test_models_of_another_kind_are_refused(form: Any, message: str, tmp_path: Path) -> None:
    """A SigLIP is written as a CLIP, and its texts are padded and pooled in another way there."""
    with pytest.raises(cg.errors.ModelError, match=message):
        write_model(as_clip(build_siglip()), tmp_path / "model", form, progress=False)
    assert not (tmp_path / "model").exists()


def test_what_lies_in_a_subfolder_is_kept(clip: Clip, tmp_path: Path, make_hf: Callable[..., Any]) -> None:
    """A note that somebody put into `tokenizer/` of an export is deleted by the next one."""
    write_model(clip, tmp_path / "model", "diffusers", progress=False)
    write_model(clip, tmp_path / "model", "diffusers", progress=False)
    (tmp_path / "model" / "tokenizer" / "note.md").write_text("mine")
    with pytest.raises(cg.errors.ModelError, match=r"holds tokenizer/note\.md, which is no part of"):
        write_model(clip, tmp_path / "model", "diffusers", progress=False)
    assert (tmp_path / "model" / "tokenizer" / "note.md").read_text() == "mine"
