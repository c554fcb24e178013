"""Features that are computed once: in order, in eval mode, and leaving the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clipgraft as cg
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.models.clip import Clip
from clipgraft.pictures import open_image


# The fast preprocessing may be a grey level of 255 off where it decodes at full size.
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-6), (False, 1e-3)])
def test_images_in_order_and_unit_norm(clip: Clip, pairs: cg.Pairs, exact: bool, tolerance: float) -> None:
    """A training image would get the features of another."""
    assert clip.preprocess is not None
    found = encode_images(clip, pairs.images, batch_size=5, workers=0, exact_preprocess=exact)
    with torch.no_grad():
        each = [clip.encode_image(clip.preprocess(open_image(path))[None]) for path in pairs.images]
    torch.testing.assert_close(found, F.normalize(torch.cat(each), dim=-1), rtol=1e-5, atol=tolerance)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")


def test_captions_in_order_whatever_their_length(clip: Clip) -> None:
    """Captions are encoded by length and once each; the caller must not notice."""
    captions = ["a long caption of very many words indeed", "b", "a", "b", "two words", "", "a"]
    found = encode_captions(clip, captions, batch_size=2)
    with torch.no_grad():
        each = torch.cat([clip.model.encode_text(clip.tokenize(caption)) for caption in captions])
    torch.testing.assert_close(found, F.normalize(each, dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], found[3])


def test_progress_counts_every_image(clip: Clip, pairs: cg.Pairs) -> None:
    """The bar would stop short of its end."""
    counted: list[int] = []
    encode_images(clip, pairs.images, batch_size=5, workers=0, progress=lambda done, _: counted.append(done))
    assert counted == [5, 10, 12]


def test_modes_are_given_back_module_by_module(clip: Clip, pairs: cg.Pairs) -> None:
    """Evaluation between epochs would switch dropout off, or a frozen part's on."""
    cg.apply_lora(clip, r=2, dropout=0.5)
    clip.train()
    clip.model.visual.eval()
    before = {name: module.training for name, module in clip.model.named_modules()}
    torch.manual_seed(0)
    first = encode_captions(clip, ["a", "b"])
    assert torch.equal(first, encode_captions(clip, ["a", "b"])), "no dropout while encoding"
    assert {name: module.training for name, module in clip.model.named_modules()} == before


def test_features_can_be_trained_with(clip: Clip, pairs: cg.Pairs) -> None:
    """Tensors from inference mode cannot be saved for a backward pass."""
    for features in (encode_images(clip, pairs.images, workers=0), encode_captions(clip, ["a"])):
        assert not features.is_inference()
        weight = torch.ones(features.shape[1], requires_grad=True)
        (features @ weight).sum().backward()


def test_nothing_to_encode_is_said(clip: Clip) -> None:
    """An empty list would end in an error about torch.cat."""
    with pytest.raises(cg.errors.DataError, match="no image to encode"):
        encode_images(clip, [])
    with pytest.raises(cg.errors.DataError, match="no caption to encode"):
        encode_captions(clip, [])


def test_a_model_without_preprocessing_is_named(tiny_openclip: torch.nn.Module) -> None:
    """A raw model cannot read files: the message says how to get one that can."""
    from clipgraft.models.clip import as_clip

    with pytest.raises(cg.errors.ModelError, match="no preprocessing: load it with"):
        encode_images(as_clip(tiny_openclip), [Path("0.png")])
