"""The shipped base model, opened with stock transformers only."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTokenizer

from clipgraft.emoji.scenes import LANGUAGES, EmojiScenes

BASE = Path(__file__).parents[2] / "src" / "clipgraft" / "assets" / "emoji" / "base"
SCENES = EmojiScenes("test", 200)


@pytest.fixture(scope="module")
def model() -> Any:
    return CLIPModel.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return CLIPProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def image_features(model: Any, processor: Any) -> torch.Tensor:
    images = [SCENES.image(i) for i in range(len(SCENES))]
    with torch.inference_mode():
        found = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(found, dim=-1)


def _recall_at_1(model: Any, processor: Any, image_features: torch.Tensor, language: str) -> float:
    """Text to image, the first caption of every scene."""
    texts = [SCENES.captions(i, language)[0] for i in range(len(SCENES))]
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        text = model.get_text_features(**tokens).pooler_output
    best = (text @ image_features.T).argmax(dim=1)
    return (best == torch.arange(len(SCENES))).float().mean().item()


def test_base_finds_english_scenes(model: Any, processor: Any, image_features: torch.Tensor) -> None:
    """The demo would start from a model that knows nothing (chance is 0.5 %)."""
    assert _recall_at_1(model, processor, image_features, "en") > 0.5


def test_base_knows_a_little_vietnamese(model: Any, processor: Any, image_features: torch.Tensor) -> None:
    """The demo would have nothing to adapt: no foothold in Vietnamese, or as good as English already."""
    english = _recall_at_1(model, processor, image_features, "en")
    assert 0.05 < _recall_at_1(model, processor, image_features, "vi") < english


def test_padding_does_not_change_text_features(model: Any, processor: Any) -> None:
    """Cutting batches at their longest caption would change results: pooling takes the first end of text."""
    texts = ["a cat", "three red apples to the left of a drum on a blue background"]
    with torch.inference_mode():
        short = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        both = model.get_text_features(**short).pooler_output
        full = processor(text=texts, padding="max_length", max_length=48, return_tensors="pt")
        padded = model.get_text_features(**full).pooler_output
    torch.testing.assert_close(both, padded, atol=1e-4, rtol=1e-4)
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id != 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_tokenizer_keeps_every_letter(language: str) -> None:
    """Vietnamese tone marks (or any other letter) would get lost before the model sees them."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert isinstance(tokenizer, CLIPTokenizer)
    for i in range(60):
        for caption in SCENES.captions(i, language):
            ids = tokenizer(caption).input_ids
            assert len(ids) <= 48 or language == "el"  # whose letters the base reads as bytes
            back = tokenizer.decode(ids, skip_special_tokens=True)
            assert back.replace(" ", "") == caption.lower().replace(" ", "")
            assert tokenizer(unicodedata.normalize("NFD", caption)).input_ids == ids


def test_tokenizer_survives_foreign_text() -> None:
    """Text with letters that training never saw would be replaced by the unknown token."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "смешарики 日本 🐸 ẵệỹ"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_base_is_complete_and_small() -> None:
    """A wheel would lack the model card or a file that transformers needs, or be too large to ship."""
    names = {path.name for path in BASE.iterdir()}
    needed = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"}
    assert needed <= names
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 25_000_000
    assert not [name for name in names if name.endswith(".part")]
