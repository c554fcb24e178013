"""`cg.load` from files gives what the stock libraries load, and `save_model` what they open."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.export import save_model
from tiny_models import TINY_OPENCLIP

CAPTIONS = ["a photo of a cat", "con mèo trên ghế"]


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A 40×50 image of noise in a Pillow mode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_pt(state: dict[str, Tensor], folder: Path) -> Path:
    """A plain state dict."""
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def save_training_checkpoint(state: dict[str, Tensor], folder: Path) -> Path:
    """What open_clip's training loop writes under DistributedDataParallel."""
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}, "optimizer": {}}
    torch.save(wrapped, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    """A safetensors file."""
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("save", [save_pt, save_training_checkpoint, save_safetensors])
def test_config_with_checkpoint_equals_open_clip(
    tiny_openclip: nn.Module,
    tiny_config: Path,
    tmp_path: Path,
    save: Callable[[dict[str, Tensor], Path], Path],
) -> None:
    """A local open_clip checkpoint gives other embeddings than open_clip gives with it."""
    clip = cg.load(tiny_config, save(tiny_openclip.state_dict(), tmp_path))
    pixels = open_clip.image_transform(32, is_train=False)(picture())
    tokens = open_clip.SimpleTokenizer()(CAPTIONS)
    assert clip.preprocess is not None
    assert clip.preprocess(picture()).equal(pixels)
    assert clip.tokenize(CAPTIONS).equal(tokens)
    with torch.no_grad():
        assert clip.encode_image(pixels[None]).equal(tiny_openclip.encode_image(pixels[None]))
        expected = tiny_openclip.encode_text(tokens)
        torch.testing.assert_close(clip.encode_text(CAPTIONS), expected, atol=1e-6, rtol=0)
    assert not clip.model.training


def test_hf_folder_equals_transformers(hf_folder: Path) -> None:
    """A local transformers folder gives other embeddings, tokens or pixels than transformers gives."""
    model = CLIPModel.from_pretrained(hf_folder).eval()
    tokenizer, processor = (kind.from_pretrained(hf_folder) for kind in (CLIPTokenizer, CLIPImageProcessor))
    for name in (str(hf_folder), hf_folder, f"hf:{hf_folder}"):
        clip = cg.load(name)
        pixels = processor(picture(), return_tensors="pt")["pixel_values"]
        inputs = tokenizer(
            CAPTIONS, padding="max_length", max_length=16, return_tensors="pt", truncation=True
        )
        assert clip.preprocess is not None
        assert clip.preprocess(picture()).equal(pixels[0])
        assert clip.tokenize(CAPTIONS).equal(inputs["input_ids"])
        with torch.no_grad():
            images, texts = model.get_image_features(pixels), model.get_text_features(**inputs)
            torch.testing.assert_close(clip.encode_image(pixels), images.pooler_output, atol=2e-6, rtol=0)
            torch.testing.assert_close(clip.encode_text(CAPTIONS), texts.pooler_output, atol=2e-6, rtol=0)


def test_openclip_folder_equals_open_clip(
    tiny_openclip: nn.Module, tiny_config: Path, tmp_path: Path
) -> None:
    """A folder that open_clip saved for the hub loses its weights or its own normalisation."""
    tiny_openclip.visual.image_mean = (0.1, 0.2, 0.3)
    tiny_openclip.visual.image_std = (0.5, 0.6, 0.7)
    config = json.loads(tiny_config.read_text(encoding="utf-8"))

    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            """SimpleTokenizer needs no files."""

    save_for_hf(tiny_openclip, NoTokenizer(), config, str(tmp_path / "model"))
    clip = cg.load(tmp_path / "model")
    pixels = open_clip.image_transform(32, is_train=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))(
        picture()
    )
    assert clip.preprocess is not None
    assert clip.preprocess(picture()).equal(pixels)
    with torch.no_grad():
        assert clip.encode_image(pixels[None]).equal(tiny_openclip.encode_image(pixels[None]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_preprocess_takes_every_image_mode(hf_folder: Path, tiny_config: Path, mode: str) -> None:
    """A greyscale, transparent or palette image stops an evaluation half way."""
    for clip in (cg.load(hf_folder), cg.load(tiny_config, "none")):
        assert clip.preprocess is not None
        assert clip.preprocess(picture(mode)).shape == (3, 32, 32)


def test_config_under_a_builtin_name(tiny_config: Path, tmp_path: Path) -> None:
    """A JSON config called ViT-B-32.json replaces open_clip's own ViT-B-32 for the rest of the program."""
    mine = tmp_path / "ViT-B-32.json"
    shutil.copy(tiny_config, mine)
    before = open_clip.list_models(), open_clip.get_model_config("ViT-B-32")
    assert cg.load(mine, "none").model.visual.conv1.out_channels == 32
    assert (open_clip.list_models(), open_clip.get_model_config("ViT-B-32")) == before


def test_config_keeps_its_preprocessing(tiny_config: Path, tmp_path: Path) -> None:
    """The mean of an open_clip_config.json is dropped, and every image is normalised wrongly."""
    whole = {
        "model_cfg": json.loads(tiny_config.read_text(encoding="utf-8")),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"},
    }
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    clip = cg.load(path, "none")
    assert clip.preprocess is not None
    white = clip.preprocess(Image.new("RGB", (40, 50), "white"))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 2.0))


def test_text_tower_of_transformers(tmp_path: Path, tiny_config: Path) -> None:
    """A model with a RoBERTa text tower is given more tokens than open_clip gives it, or is cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = tmp_path / "roberta"
    RobertaModel(RobertaConfig(vocab_size=20, max_position_embeddings=40, **sizes)).save_pretrained(text)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "dog": 5}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        text
    )
    config = json.loads(tiny_config.read_text(encoding="utf-8"))
    config["text_cfg"] = {
        "hf_model_name": str(text),
        "hf_tokenizer_name": str(text),
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    path = tmp_path / "roberta-tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    clip = cg.load(path, "none")
    tokens = clip.tokenize(["cat dog", "dog"])
    assert tokens.shape == (2, 12)
    assert clip.cut_tokens(tokens).shape == (2, 2)
    assert {site.tower for site in clip.sites} == {"text", "vision"}
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(tokens), clip.model.encode_text(tokens))
    assert len(clip.fingerprint) == 16


@pytest.mark.parametrize("spelling", ["tiny-clip", "tiny/clip"])
def test_builtin_name_with_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Path, tmp_path: Path, spelling: str
) -> None:
    """open_clip's spelling ViT-B/32 gets the tokenizer of another context length."""
    config = json.loads(tiny_config.read_text(encoding="utf-8"))
    config["text_cfg"]["context_length"] = 20
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
    model = open_clip.CLIP(**copy.deepcopy(config))
    clip = cg.load(spelling, save_pt(model.state_dict(), tmp_path))
    assert clip.tokenize(CAPTIONS).shape == (2, 20)
    assert clip.fingerprint == as_clip(model).fingerprint


def test_random_weights_follow_the_seed(tiny_config: Path) -> None:
    """`--pretrained none` cannot be repeated, or reseeds the caller's own random numbers."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (cg.load(tiny_config, "none", seed=seed).fingerprint for seed in (1, 1, 2))
    assert torch.rand(3).equal(expected)
    assert first == again != other


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(hf_folder: Path, precision: str, dtype: torch.dtype) -> None:
    """A base in half precision is another base, so that its adapters are refused."""
    full, half = cg.load(hf_folder), cg.load(hf_folder, precision=precision)
    assert half.dtype == dtype
    assert half.fingerprint == full.fingerprint
    with torch.no_grad():
        features = half.encode_text(CAPTIONS, normalize=True).float()
        cosine = (features * full.encode_text(CAPTIONS, normalize=True)).sum(-1)
    assert cosine.min() > 0.99


def test_adapter_brings_its_base(hf_folder: Path, tmp_path: Path) -> None:
    """`cg.load` of an adapter folder gives another model than the one that was saved."""
    clip = cg.load(hf_folder)
    cg.apply_lora(clip, r=2)
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    cg.save_adapter(clip, tmp_path / "adapter")
    loaded = cg.load(tmp_path / "adapter")
    with torch.no_grad():
        assert loaded.encode_text(CAPTIONS).equal(clip.encode_text(CAPTIONS))
    with pytest.raises(cg.errors.AdapterError, match="leave out `pretrained` openai"):
        cg.load(tmp_path / "adapter", "openai")


def test_saved_models_open_in_their_library(hf_folder: Path, tiny_config: Path, tmp_path: Path) -> None:
    """A fully fine-tuned model can only be opened by clipgraft, or comes back without its tokenizer."""
    tuned = cg.load(tiny_config, "none")
    written = save_model(tuned, tmp_path / "epoch_1", 1)
    stock = open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))
    open_clip.load_checkpoint(stock, str(written))
    assert as_clip(stock).fingerprint == tuned.fingerprint
    assert cg.load(tiny_config, written).fingerprint == tuned.fingerprint
    tuned = cg.load(hf_folder)
    nn.init.normal_(tuned.model.text_projection.weight)
    for _ in range(2):  # the second one replaces the first
        written = save_model(tuned, tmp_path / "epoch_2", 2)
    assert as_clip(CLIPModel.from_pretrained(written)).fingerprint == tuned.fingerprint
    again = cg.load(written)
    assert again.fingerprint == tuned.fingerprint
    assert again.tokenize(CAPTIONS).equal(tuned.tokenize(CAPTIONS))
    assert again.preprocess is not None
    assert tuned.preprocess is not None
    assert again.preprocess(picture()).equal(tuned.preprocess(picture()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1.pt", "epoch_2"]
