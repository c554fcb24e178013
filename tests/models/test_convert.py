"""A model and its twin in the other library: the same bits, features, tokens and pixels."""

from __future__ import annotations

import copy
import html
from collections.abc import Callable
from pathlib import Path

import ftfy
import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import clipgraft as cg
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.convert import to_open_clip, to_transformers
from tiny_models import EOS_ID, TINY_HF_TOWER, TINY_OPENCLIP, in_every_layout, randomise
from tiny_models import to_transformers as by_hand

CAPTIONS = ["a photo of a cat", "một con mèo trên ghế 😀", "it's 42 things, isn't it?", "", "word " * 100]
MEAN_STD = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def with_settings(model: nn.Module, **other: object) -> Clip:
    """An open_clip model with its preprocessing recorded on it, as open_clip's factory does."""
    mean, std = MEAN_STD
    config = {"size": 32, "mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    model.visual.preprocess_cfg = {**config, **other}
    return as_clip(model)


def photo(width: int, height: int) -> Image.Image:
    """Soft random colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))


def features(clip: Clip, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text features of the library's own forward."""
    size = clip.family.image_size(clip.model)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return clip.family.encode_image(clip.model, pixels), clip.family.encode_text(clip.model, ids)


def assert_twins(clip: Clip, twin: Clip, ids: Tensor) -> None:
    for given_features, wanted in zip(features(twin, ids), features(clip, ids), strict=True):
        torch.testing.assert_close(given_features, wanted, atol=1e-5, rtol=0)
    assert twin.fingerprint == clip.fingerprint
    assert twin.logit_scale.item() == clip.logit_scale.item()


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_every_open_clip_layout_becomes_a_clip_model(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """A model that was trained in open_clip gives other features in transformers."""
    layouts = in_every_layout(tiny_openclip, tiny_openclip_4x)
    wanted = layouts.pop("CLIPModel")
    for model in layouts.values():
        clip = with_settings(model)
        twin = to_transformers(clip)
        assert type(twin.model) is CLIPModel
        assert_twins(clip, twin, clip.tokenize(CAPTIONS))
        assert_same_bits(twin.model, wanted)
        assert not twin.model.training


def test_a_clip_model_becomes_an_open_clip_model_and_comes_back(tiny_openclip: nn.Module) -> None:
    """A model that was trained in transformers loses bits on its way to open_clip, or cannot come back."""
    clip = as_clip(by_hand(tiny_openclip))
    twin = to_open_clip(clip)
    assert type(twin.model) is open_clip.CLIP
    assert_twins(clip, twin, open_clip.tokenize(CAPTIONS))
    assert_same_bits(twin.model, tiny_openclip)
    assert_same_bits(to_transformers(twin).model, clip.model)


def test_the_emoji_base_goes_to_open_clip_and_back() -> None:
    """The shipped model, with a vocabulary of its own, could not be used in open_clip."""
    clip = cg.load("emoji")
    twin = to_open_clip(clip)
    texts = ["a red apple", "con mèo trên ghế 😀", "word " * 100, ""]
    assert twin.tokenize(texts).equal(clip.tokenize(texts))
    assert twin.count_tokens(texts) == clip.count_tokens(texts)
    assert_twins(clip, twin, clip.tokenize(texts))
    back = to_transformers(twin)
    assert_same_bits(back.model, clip.model)
    assert back.tokenize(texts).equal(clip.tokenize(texts))
    for part in ("text_config", "vision_config"):
        given_config, wanted = (getattr(m.config, part).to_dict() for m in (back.model, clip.model))
        assert {**given_config, "dtype": None} == {**wanted, "dtype": None}
    picture = photo(150, 100)
    grey = (twin.require_preprocess()(picture) - clip.require_preprocess()(picture)).abs() * 0.5 * 255
    assert grey.max() < 2.01
    assert back.require_preprocess()(picture).equal(clip.require_preprocess()(picture))


@pytest.mark.parametrize("eos", [2, 50, EOS_ID])
def test_texts_are_pooled_at_the_same_token(make_hf: Callable[..., nn.Module], eos: int) -> None:
    """A model whose end-of-text token is not its largest id is pooled somewhere else in open_clip."""
    clip = as_clip(make_hf(eos_token_id=eos))
    ids = torch.randint(3, 49, (3, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 4], ids[:, 9] = EOS_ID, EOS_ID
    ids[:, 2] = eos
    twin = to_open_clip(clip)
    assert_twins(clip, twin, ids)
    assert_twins(clip, to_transformers(twin), ids)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_unusual_measures_survive(act: str) -> None:
    """A tower with another activation, epsilon, MLP width or number of heads computes something else."""
    tower = {**TINY_HF_TOWER, "hidden_act": act, "intermediate_size": 99, "layer_norm_eps": 1e-3}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 60, "max_position_embeddings": 9, "eos_token_id": 59},
        vision_config={
            **tower,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
        },
        projection_dim=20,
    )
    clip = as_clip(randomise(CLIPModel(config)).eval())
    ids = torch.tensor([[1, 2, 3, 59, 59, 59, 59, 59, 59], [4, 5, 6, 7, 8, 9, 10, 11, 59]])
    twin = to_open_clip(clip)
    assert_twins(clip, twin, ids)
    back = to_transformers(twin)
    assert_same_bits(back.model, clip.model)
    assert back.model.config.text_config.hidden_act == act
    assert back.model.config.text_config.intermediate_size == 99


def test_bf16_stays_bf16(tiny_openclip: nn.Module) -> None:
    """A half-size model doubles, or its twin is another base for adapters."""
    clip = with_settings(tiny_openclip.to(torch.bfloat16))
    twin = to_transformers(clip)
    assert twin.dtype == torch.bfloat16
    assert_same_bits(to_open_clip(twin).model, clip.model)


def test_converting_draws_no_random_numbers(tiny_openclip: nn.Module) -> None:
    """Training after a conversion cannot be repeated with the same seed."""
    clip = with_settings(tiny_openclip)
    before = torch.random.get_rng_state()
    to_open_clip(to_transformers(clip))
    assert torch.random.get_rng_state().equal(before)


# The two libraries know different versions of Unicode, and disagree on characters that only one has.
_KNOWN = st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Co", "Cn"))


@settings(max_examples=60)
@given(st.text(_KNOWN, max_size=60) | st.sampled_from(CAPTIONS))
def test_tokens_are_the_same_whatever_the_text(tokenizers: tuple[Clip, Clip], text: str) -> None:
    """Captions in some language or with emoji are read as other words after a conversion."""
    clip, twin = tokenizers
    # open_clip repairs broken text with ftfy, and lowers Σ, İ and the like with Python's tables, not Rust's.
    if html.unescape(ftfy.fix_text(text)) != text or text.lower() != "".join(c.lower() for c in text):
        return
    # open_clip alone takes these for the tokens themselves.
    if any(mark in text.lower() for mark in ("<start_of_text>", "<end_of_text>")):
        return
    ids, twin_ids = clip.tokenize(text)[0].tolist(), twin.tokenize(text)[0].tolist()
    end = ids.index(49407)
    assert twin_ids[: end + 1] == ids[: end + 1]
    assert set(twin_ids[end:]) == {49407}


@pytest.mark.parametrize("text", ["<|startoftext|>", "a<|endoftext|>b", "<|EndOfText|>"])
def test_a_marker_written_in_a_caption_is_text(
    tokenizers: tuple[Clip, Clip], tmp_path: Path, text: str
) -> None:
    """A caption that spells the end token is cut there after a conversion, also once it was saved."""
    clip, twin = tokenizers
    twin.tokenizer.inner.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)([text])["input_ids"][0]
    ids = clip.tokenize(text)[0].tolist()
    wanted = ids[: ids.index(49407) + 1]
    assert twin.tokenize(text)[0].tolist()[: len(wanted)] == reloaded == wanted
    assert len(wanted) > 3


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Clip, Clip]:
    model = open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP)).eval()
    clip = with_settings(model)
    return clip, to_transformers(clip)


@pytest.mark.parametrize("size", [(500, 375), (64, 90), (20, 33), (1001, 700)])
@pytest.mark.parametrize("other", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_pixels_are_the_same_but_for_rounding(
    tiny_openclip: nn.Module, size: tuple[int, int], other: dict[str, str]
) -> None:
    """Images are cut, scaled or normalised in another way after a conversion."""
    clip = with_settings(tiny_openclip, **other)
    picture = photo(*size)
    std = torch.tensor(MEAN_STD[1])[:, None, None]
    wanted = clip.require_preprocess()(picture)
    twin = to_transformers(clip)
    grey = (twin.require_preprocess()(picture) - wanted).abs() * std * 255
    assert grey.max() < 2.01
    assert grey.mean() < 0.1
    assert to_open_clip(twin).require_preprocess()(picture).equal(wanted)


def test_a_tokenizer_of_its_own_comes_along(hf_folder: Path) -> None:
    """A model with another vocabulary than CLIP's reads other tokens in open_clip."""
    clip = cg.load(hf_folder)
    twin = to_open_clip(clip)
    texts = ["the  cat th", "a b c", "x" * 40]
    assert twin.tokenize(texts).equal(clip.tokenize(texts))
    assert to_transformers(twin).tokenize(texts).equal(clip.tokenize(texts))


def test_clips_own_tokenizer_becomes_simple_tokenizer(tokenizers: tuple[Clip, Clip]) -> None:
    """A checkpoint from the hub gets a tokenizer that needs files where open_clip needs none."""
    back = to_open_clip(tokenizers[1])
    assert type(back.tokenizer.inner) is open_clip.SimpleTokenizer
    assert back.tokenize(CAPTIONS).equal(tokenizers[0].tokenize(CAPTIONS))


def test_what_has_no_twin_is_refused(tiny_openclip: nn.Module, make_hf: Callable[..., nn.Module]) -> None:
    """A model would be converted to one that computes something else."""
    tower = {"layers": 1, "width": 32, "ls_init_value": 0.1}
    scaled = copy.deepcopy(TINY_OPENCLIP)
    scaled["vision_cfg"] |= tower
    with pytest.raises(cg.errors.ModelError, match="its vision tower is not CLIP's own transformer"):
        to_transformers(as_clip(open_clip.CLIP(**scaled)))
    with pytest.raises(cg.errors.ModelError, match="logit_bias"):
        to_transformers(as_clip(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP), init_logit_bias=-10.0)))
    with pytest.raises(cg.errors.ModelError, match="resized to 32x32 in mode 'longest'"):
        to_transformers(with_settings(tiny_openclip, resize_mode="longest"))
    oblong = copy.deepcopy(TINY_OPENCLIP)
    oblong["vision_cfg"]["image_size"] = [32, 64]
    with pytest.raises(cg.errors.ModelError, match="squares only"):
        to_transformers(as_clip(open_clip.CLIP(**oblong)))
    clip = as_clip(make_hf())
    cg.apply_lora(clip, r=2)
    with pytest.raises(cg.errors.ModelError, match="carries an adapter"):
        to_open_clip(clip)


def test_mixed_activations_have_no_open_clip_twin(make_hf: Callable[..., nn.Module]) -> None:
    """open_clip would quietly compute QuickGELU in both towers."""
    with pytest.raises(cg.errors.ModelError, match="QuickGELU"):
        to_open_clip(as_clip(make_hf(hidden_act="gelu")))
