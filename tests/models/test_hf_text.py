"""open_clip models whose text tower is of transformers: loaded with their tokenizers from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    M2M100Config,
    MT5Config,
    NllbTokenizer,
    PreTrainedConfig,
    XLMRobertaConfig,
)

import clipgraft as cg
from clipgraft.errors import ModelError
from clipgraft.models.clip import as_clip
from tiny_dual import TEXTS, build, ids_of, tokenizer_of
from tiny_models import TINY_OPENCLIP

_SIZES = {"vocab_size": 20, "max_position_embeddings": 40, "pad_token_id": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    "XLM-R": XLMRobertaConfig(
        **_SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
    "NLLB": M2M100Config(
        **_SIZES,
        d_model=32,
        **{
            f"{part}_{name}": size
            for part in ("encoder", "decoder")
            for name, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 48}.items()
        },
    ),
    "mT5": MT5Config(vocab_size=20, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0),
}
POOLERS = {"XLM-R": "mean_pooler", "NLLB": "cls_pooler", "mT5": "mean_pooler"}


def model_config(name: str, folder: Path, padding: int | None = None, **text: Any) -> Path:
    """An open_clip JSON config whose text tower and tokenizer lie in a local folder."""
    config = CONFIGS[name]
    config.save_pretrained(folder / "text")
    tokenizer_of(config.pad_token_id if padding is None else padding).save_pretrained(folder / "text")
    text_cfg = {
        "hf_model_name": str(folder / "text"),
        "hf_tokenizer_name": str(folder / "text"),
        "hf_pooler_type": POOLERS[name],
        "hf_proj_type": "linear",
        **text,
    }
    path = folder / "model.json"
    path.write_text(json.dumps({**TINY_OPENCLIP, "text_cfg": text_cfg}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list(CONFIGS))
def test_texts_are_padded_as_the_tower_hides_it(name: str, tmp_path: Path) -> None:
    """A Vietnamese caption has other features alone than beside a longer one, or than open_clip's own."""
    clip = cg.load(model_config(name, tmp_path), "none")
    tokens = clip.tokenize(TEXTS)
    assert tokens.shape == (3, 77)
    assert clip.count_tokens(TEXTS) == [5, 4, 7]
    short = tokens[:, : 38 if name == "XLM-R" else 40]  # what the table of positions takes
    assert clip.cut_tokens(tokens).shape == (3, 7)
    with torch.no_grad():
        wanted = clip.model.encode_text(short)
        torch.testing.assert_close(clip.encode_text(TEXTS), wanted)
        alone = torch.cat([clip.encode_text(text) for text in TEXTS])
        torch.testing.assert_close(alone, wanted)


@pytest.mark.parametrize("language", ["eng_Latn", "vie_Latn"])
def test_the_language_is_said(language: str, tmp_path: Path) -> None:
    """Vietnamese captions are read as English, and nobody is told."""
    path = model_config("NLLB", tmp_path)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "eng_Latn", "vie_Latn", "<mask>", "▁", "a"]
    inner = NllbTokenizer(
        {word: number for number, word in enumerate(vocabulary)},
        [],
        additional_special_tokens=["eng_Latn", "vie_Latn"],
    )
    inner.save_pretrained(tmp_path / "text")
    config = json.loads(path.read_text(encoding="utf-8"))
    if language != "eng_Latn":
        config["text_cfg"]["tokenizer_kwargs"] = {"language": language}
    path.write_text(json.dumps(config), encoding="utf-8")
    clip = cg.load(path, "none")
    assert f"every text begins with the language {language}" in clip.notes[-1]
    ids = inner.convert_tokens_to_ids(["eng_Latn", "vie_Latn"])
    assert int(clip.tokenize("a")[0, 0]) == ids[language == "vie_Latn"]
    clip.tokenizer.inner.tokenizer.src_lang = "vie_Latn"
    assert int(clip.tokenize("a")[0, 0]) == ids[1]


def test_another_padding_is_refused(tmp_path: Path) -> None:
    """The tokenizer pads with an id that the tower reads as a word, and nobody is told."""
    path = model_config("XLM-R", tmp_path, padding=0)
    with pytest.raises(ModelError, match="the tokenizer pads with id 0, but the text tower hides 1"):
        cg.load(path, "none")


def test_max_pooler_is_refused(tmp_path: Path) -> None:
    """open_clip's max_pooler fails with an error of torch about masks."""
    clip = cg.load(model_config("XLM-R", tmp_path, hf_pooler_type="max_pooler"), "none")
    with pytest.raises(ModelError, match=r"max_pooler.*build the model with hf_pooler_type mean_pooler"):
        clip.encode_text(TEXTS)


def test_a_base_is_what_it_was_before_its_text_had_sites() -> None:
    """Adapters of the vision tower from before are refused, as the base has another fingerprint."""
    model = build("open_clip XLM-R")
    names = {name for name, _ in as_clip(model).family.canonical_weights(model)}
    assert "text.transformer.encoder.layer.0.attention.self.query.weight" in names
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in names


def test_vision_adapters_keep_their_names(tmp_path: Path) -> None:
    """An adapter of the vision tower alone is written in other names than those of before."""
    model = build("open_clip XLM-R")
    cg.apply_lora(model, r=2, targets="vision.0.q")
    folder = cg.save_adapter(model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["vision_model.encoder.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("name", ["open_clip XLM-R", "open_clip NLLB", "open_clip mT5", "open_clip BERT"])
def test_groups_run_from_input_to_output(name: str) -> None:
    """`lock_text_unlocked_layers` unlocks other parts than the last ones, or leaves some out."""
    model = build(name)
    groups = as_clip(model).family.tower_groups(model, "text")
    named = {id(p): key.removeprefix("text.") for key, p in model.named_parameters()}
    found = [[named[id(p)] for p in group] for group in groups]
    assert len(groups) == 4
    assert sorted(key for group in found for key in group) == sorted(
        key.removeprefix("text.") for key, _ in model.named_parameters() if key.startswith("text.")
    )
    assert all(key.startswith("proj") for key in found[3])
    assert all(".0." in key for key in found[1])
    assert any("embed" in key for key in found[0])


def test_checkpointing_changes_nothing() -> None:
    """Recomputing blocks to save memory fails, or changes the gradient."""
    gradients = []
    for enable in (False, True):
        model = build("open_clip XLM-R").train()
        as_clip(model).family.set_grad_checkpointing(model, enable)
        cg.apply_lora(model, r=2, targets="text.0.q", init="default")
        model.encode_text(ids_of("open_clip XLM-R")).sum().backward()
        gradients.append(next(p.grad for n, p in model.named_parameters() if "lora_B" in n))
    torch.testing.assert_close(gradients[0], gradients[1])
