"""Evaluating, encoding and searching on the stand-in device, against the CPU's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clipgraft as cg
from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.evaluate.classification import evaluate_classification
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.models.clip import Clip
from explicit_lora import randomise_active
from standin_device import recorded_waits

MakeClip = Callable[[], Clip]
EXACT = FeatureArgs(autocast=False, workers=0)


@pytest.fixture
def both(make_clip: MakeClip, device: torch.device) -> tuple[Clip, Clip]:
    """The same adapted model on the CPU and on the device."""
    clips = make_clip(), make_clip()
    for clip in clips:
        torch.manual_seed(0)
        cg.apply_lora(clip, targets="all", r=2)
        randomise_active(clip.model)
    return clips[0], clips[1].to(device)


def test_features_and_metrics_are_the_cpus(both: tuple[Clip, Clip], pairs: cg.Pairs) -> None:
    """`eval` on a GPU reports another recall or accuracy than on the CPU, or fails."""
    captions = [caption for group in pairs.captions for caption in group]
    data = Labelled(pairs.images, tuple(n % 3 for n in range(len(pairs))), ("a", "b", "c"))
    images, texts, retrieval, classes = zip(
        *(
            (
                encode_images(clip, pairs.images, EXACT),
                encode_captions(clip, captions),
                cg.evaluate_retrieval(clip, pairs, features=EXACT),
                evaluate_classification(clip, data, (("a",), ("b", "a b"), ("c",)), features=EXACT).metrics,
            )
            for clip in both
        ),
        strict=True,
    )
    assert torch.allclose(*images, atol=1e-5)
    assert torch.allclose(*texts, atol=1e-5)
    assert retrieval[0] == pytest.approx(retrieval[1])
    assert classes[0] == pytest.approx(classes[1], rel=1e-4)


def test_captions_are_not_sent_to_be_read_back(both: tuple[Clip, Clip]) -> None:
    """Encoding captions on a GPU waits for it once a batch for what was known on the CPU."""
    texts = [f"thing {'very ' * (n % 4)}{n}" for n in range(9)]
    with recorded_waits() as waits:
        encode_captions(both[1], texts, batch_size=3, autocast=False)
    assert [(wait.operator, wait.place) for wait in waits] == [
        ("to host", "data/features.py:encode_captions")
    ] * 3


def test_ranks_are_the_cpus(device: torch.device) -> None:
    """Recall of features that are on a GPU fails, or counts other ranks."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(40, 8), dim=-1) for _ in range(2))
    owner = torch.arange(40)
    wanted = retrieval_ranks(images, texts, owner)
    found = retrieval_ranks(images.to(device), texts.to(device), owner)
    assert torch.equal(found.image_to_text.cpu(), wanted.image_to_text)
    assert torch.equal(found.text_to_image.cpu(), wanted.text_to_image)


def test_an_encoded_folder_is_the_cpus(both: tuple[Clip, Clip], pairs: cg.Pairs, tmp_path: Path) -> None:
    """Vectors that a GPU wrote do not fit the index that a CPU wrote, or no query finds them."""
    vectors = []
    for name, clip in zip(("cpu", "device"), both, strict=True):
        with recorded_waits() as waits:
            cg.search.encode_folder(
                clip, pairs.images[0].parent, tmp_path / name, workers=0, autocast=False, batch_size=4
            )
        vectors.append(np.load(tmp_path / name / "img_emb" / "img_emb_0.npy").astype(np.float32))
    assert vectors[0].shape == (12, 24)
    assert np.allclose(*vectors, atol=1e-3)
    once = {("to host", "search/encode.py:whole"), ("to host", "search/folder.py:adapter_digest")}
    assert {(wait.operator, wait.place) for wait in waits} == once
    wanted, found = (
        cg.search.query(tmp_path / "cpu", "thing 3", image=pairs.images[0], model=clip) for clip in both
    )
    assert [hit.path for hit in found] == [hit.path for hit in wanted]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)
