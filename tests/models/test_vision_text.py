"""AltCLIP, ChineseCLIP and VisionTextDualEncoder from the folders that transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor

import clipgraft as cg
from clipgraft.errors import ModelError
from clipgraft.models.clip import as_clip
from explicit_lora import largest
from tiny_dual import TEXTS, build, ids_of, padding_of, tokenizer_of
from weight_places import SIZE

NAMES = ["AltCLIP", "ChineseCLIP", "ViT and BERT", "CLIP vision and XLM-R"]


def saved(name: str, folder: Path, padding: int | None = None) -> Path:
    """A folder as `save_pretrained` of model, tokenizer and processor makes it."""
    build(name).save_pretrained(folder)
    tokenizer_of(padding_of(name) if padding is None else padding).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_loaded(name: str, tmp_path: Path) -> None:
    """A folder cannot be loaded, its weights get lost, or its texts are read with their padding."""
    clip = cg.load(saved(name, tmp_path))
    # transformers zeroes the row of padding in some embeddings when it loads them.
    stock = type(clip.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert clip.fingerprint == as_clip(stock).fingerprint
    with torch.no_grad():
        ours, wanted = (of.encode_text(ids_of(name)) for of in (clip, as_clip(build(name))))
        assert largest((ours,), (wanted,)) < 1e-5
    with torch.no_grad():
        together = clip.encode_text(TEXTS)
        alone = torch.cat([clip.encode_text(text) for text in TEXTS])
    torch.testing.assert_close(alone, together)
    cg.apply_lora(clip, r=2, targets="linear")
    cg.save_adapter(clip, tmp_path / "adapter")
    again = cg.load(tmp_path / "adapter")
    assert {str(site) for site in cg.read_adapter(tmp_path / "adapter").sites} <= set(map(str, again.sites))
    torch.testing.assert_close(again.encode_text(TEXTS), together)


def test_a_tokenizer_of_another_padding_is_refused(tmp_path: Path) -> None:
    """The tokenizer pads with an id that the tower reads as a word, and nobody is told."""
    with pytest.raises(ModelError, match="pads with id 0, but the text tower hides 1 as padding"):
        cg.load(saved("AltCLIP", tmp_path, padding=0))
