"""Raw models bring their tokenizer and preprocessing along where they can."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

import clipgraft as cg
from clipgraft.models.clip import as_clip

PICTURE = Image.radial_gradient("L").convert("RGB").resize((50, 40))


def test_raw_open_clip_is_tokenized_as_open_clip_does(tiny_openclip: nn.Module) -> None:
    """Strings given to a model made with open_clip itself would be refused, or read as other tokens."""
    texts = ["một con mèo", "two apples"]
    assert torch.equal(as_clip(tiny_openclip).tokenize(texts), open_clip.tokenize(texts))


def test_raw_open_clip_preprocesses_as_open_clip_does(tiny_config: Path) -> None:
    """Images given to a model made with open_clip itself would be refused, or prepared in another way."""
    open_clip.add_model_config(tiny_config)
    model, _, transform = open_clip.create_model_and_transforms(tiny_config.stem)
    assert torch.equal(as_clip(model).require_preprocess()(PICTURE), transform(PICTURE))


def test_raw_transformers_model_uses_its_own_folder(hf_folder: Path) -> None:
    """A model from from_pretrained would need its tokenizer and processor passed by hand."""
    clip = as_clip(CLIPModel.from_pretrained(hf_folder))
    ids = CLIPTokenizer.from_pretrained(hf_folder)(
        ["a b"], padding="max_length", max_length=clip.context_length
    )
    assert clip.tokenize("a b").tolist() == ids["input_ids"]
    pixels = CLIPImageProcessor.from_pretrained(hf_folder)(PICTURE, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(clip.require_preprocess()(PICTURE), pixels)


def test_models_that_do_not_tell_say_what_to_do(tiny_hf: nn.Module) -> None:
    """A model built from a bare configuration must end in one clear line, not in a NoneType error."""
    with pytest.raises(cg.errors.ModelError, match=r"no tokenizer: load it with clipgraft\.load"):
        as_clip(tiny_hf).tokenize("a")
    with pytest.raises(cg.errors.ModelError, match=r"no preprocessing: load it with clipgraft\.load"):
        as_clip(tiny_hf).require_preprocess()
