"""Two towers of the user's own: what is found in them, what they need not have, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, MT5Config, MT5Model

import clipgraft as cg
from clipgraft.data.feature_key import UnknownError, tower_fingerprint
from clipgraft.errors import ModelError
from clipgraft.models import DualEncoder, FeatureTable
from clipgraft.models.clip import as_clip
from explicit_lora import randomise_lora
from tiny_dual import build, tokenizer_of

_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


class Mixer(nn.Module):
    """A block whose layers have names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.think = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.think(torch.tanh(self.look(x)))
        return found


class Pair(nn.Module):
    """The least that a model must have."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), Mixer(), Mixer())
        self.text_tower = nn.Sequential(nn.EmbeddingBag(20, 8), Mixer())
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.places = {"look": "fc1", "think": "fc2"}

    def encode_image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.vision_tower(pixels)
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.text_tower(tokens)
        return found


class Letters:
    """A tokenizer of one id a letter."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(letter) % 20 for letter in text.ljust(6)[:6]] for text in texts])

    def count(self, texts: Sequence[str]) -> list[int]:
        return list(map(len, texts))


def test_a_model_with_names_of_its_own(tmp_path: Path) -> None:
    """The least model of the protocol has no sites, or loses its adapter on the way to a file."""
    torch.manual_seed(0)
    model = Pair().eval()
    clip = as_clip(model)
    clip.tokenizer = Letters()
    assert list(map(str, clip.sites)) == ["text.0.fc1", "text.0.fc2"] + [
        f"vision.{block}.{role}" for block in range(2) for role in ("fc1", "fc2")
    ]
    base = clip.encode_text(["con", "mèo"]), clip.encode_image(torch.ones(2, 3, 2, 2))
    cg.apply_lora(model, r=2, targets="mlp")
    randomise_lora(model)
    adapted = clip.encode_text(["con", "mèo"]), clip.encode_image(torch.ones(2, 3, 2, 2))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(adapted, base, strict=True))
    folder = cg.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = Pair().eval()
    cg.load_adapter(other, folder)
    torch.testing.assert_close(other.encode_image(torch.ones(2, 3, 2, 2)), adapted[1])


def test_texts_of_unknown_towers_are_left_whole() -> None:
    """Ids are cut from a tower of which nobody knows whether it sees them."""
    model = Pair()
    tokens = torch.zeros(2, 6, dtype=torch.long)
    assert as_clip(model).cut_tokens(tokens) is tokens
    double = DualEncoder(nn.Flatten(), nn.EmbeddingBag(20, 8))
    assert as_clip(double).cut_tokens(tokens) is tokens


def test_features_of_a_changed_class_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached features of an image tower are used after its code has changed."""
    model = as_clip(Pair())
    before = tower_fingerprint(model)
    assert tower_fingerprint(as_clip(model.model)) == before

    def forward(self: Mixer, x: Tensor) -> Tensor:
        return x + self.think(torch.relu(self.look(x)))

    monkeypatch.setattr(Mixer, "forward", forward)
    assert tower_fingerprint(model) != before


def test_features_of_a_class_in_a_script_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next script's class of the same name gets the features of this one."""
    monkeypatch.setattr(Mixer, "__module__", "__main__")
    with pytest.raises(UnknownError, match="move it to a module"):
        tower_fingerprint(as_clip(Pair()))


def test_two_image_towers_have_two_fingerprints() -> None:
    """Features of one image tower alone, or of one's own, are looked up for another one."""
    one = tower_fingerprint(as_clip(build("CLIPVisionModel")))
    other = build("CLIPVisionModel")
    other.encoder.layers[0].mlp.activation_fn = nn.ReLU()
    assert tower_fingerprint(as_clip(other)) != one
    pair, moved = build("own DINOv2 and XLM-R"), build("own DINOv2 and XLM-R")
    with torch.no_grad():
        moved.vision_tower.encoder.layer[0].mlp.fc1.weight.add_(1)
    assert tower_fingerprint(as_clip(pair)) != tower_fingerprint(as_clip(moved))


def test_what_is_no_encoder_is_refused() -> None:
    """A decoder in place of a text tower fails at the first batch."""
    bert = BertModel(BertConfig(**_BERT, vocab_size=20))
    whole = MT5Model(MT5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="MT5Model is an encoder with a decoder: pass its encoder"):
        DualEncoder(bert, whole)
    DualEncoder(bert, whole.get_encoder())


def test_a_tokenizer_of_another_padding_is_refused() -> None:
    """The tokenizer pads with an id that the text tower reads as a word."""
    bert = BertModel(BertConfig(**_BERT, vocab_size=20, pad_token_id=0))
    with pytest.raises(ModelError, match="pads with id 1, but the text tower hides 0 as padding"):
        DualEncoder(nn.Flatten(), bert, tokenizer=tokenizer_of(1))
    model = DualEncoder(nn.Flatten(), bert, tokenizer=tokenizer_of(0))
    assert as_clip(model).tokenize("con mèo").shape == (1, 77)
    assert as_clip(model).context_length == 77


def test_a_table_is_no_weight() -> None:
    """Features in place of a tower train along, or are thought of as sites."""
    table = FeatureTable(["a"], torch.ones(1, 8))
    model = DualEncoder(table, BertModel(BertConfig(**_BERT, vocab_size=20)))
    assert not list(table.parameters())
    assert {site.tower for site in as_clip(model).sites} == {"text"}
