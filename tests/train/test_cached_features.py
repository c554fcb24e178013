"""The feature cache in use: one encoding for training, evaluation and the next run, and the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.data import features
from clipgraft.data.args import FeatureArgs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_images, image_rows
from clipgraft.data.stored_rows import RowKind
from clipgraft.models.clip import Clip
from fitting import groups

MakeClip = Callable[[], Clip]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """An empty cache."""
    return FeatureCache(tmp_path / "features")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images of every encoding."""
    counted: list[int] = []
    real = features.image_batches

    def counting(paths: Sequence[Path], *args: Any, **options: Any) -> Any:
        counted.append(len(paths))
        return real(paths, *args, **options)

    monkeypatch.setattr(features, "image_batches", counting)
    return counted


def text_adapter(clip: Clip) -> Clip:
    torch.manual_seed(0)
    cg.apply_lora(clip, r=2, dropout=0.1, targets="text-attention")
    return clip


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> cg.train.FitResult:
    settings: dict[str, Any] = {"batch_size": 6, "epochs": 2, "lr": 1e-2, "workers": 0, "progress": False}
    return cg.fit(clip, pairs, pairs, **groups(out=out, **{**settings, **options}))


def weights(result: cg.train.FitResult) -> bytes:
    return (result.saved / "adapter_model.safetensors").read_bytes()


def test_a_hit_has_the_bits_of_the_miss(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, seen: list[int]
) -> None:
    """A run that is repeated would train on other features."""
    counted: list[int] = []
    plain = encode_images(clip, pairs.images, workers=0, batch_size=5)
    miss = encode_images(clip, pairs.images, workers=0, batch_size=5, cache=cache)
    tell = lambda done, _: counted.append(done)  # noqa: E731
    hit = encode_images(clip, pairs.images, workers=0, batch_size=5, cache=cache, progress=tell)
    assert torch.equal(plain, miss)
    assert torch.equal(plain, hit)
    assert (sum(seen), counted) == (2 * len(pairs), [len(pairs)])
    for found in (miss, hit):
        assert not found.is_inference()
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")


def test_the_cache_changes_no_bit_of_an_adapter(
    make_clip: MakeClip, pairs: cg.Pairs, cache: FeatureCache, tmp_path: Path
) -> None:
    """`--feature-cache` would be a setting that decides what is trained."""
    results = [
        fit(text_adapter(make_clip()), pairs, tmp_path / f"run{number}", cache=used)
        for number, used in enumerate((None, cache, cache))
    ]
    assert weights(results[0]) == weights(results[1]) == weights(results[2])
    assert results[0].history == results[1].history == results[2].history


def test_evaluation_after_training_encodes_no_image(
    make_clip: MakeClip, pairs: cg.Pairs, cache: FeatureCache, tmp_path: Path, seen: list[int]
) -> None:
    """Each command of the same data would pay for the image tower again."""
    saved = fit(text_adapter(make_clip()), pairs, tmp_path / "run", cache=cache).saved
    assert seen == [len(pairs)], "validation is on the same images"
    clip = make_clip()
    base = cg.evaluate_retrieval(clip, pairs, workers=0, cache=cache)
    cg.load_adapter(clip, saved)
    adapted = cg.evaluate_retrieval(clip, pairs, workers=0, cache=cache)
    assert seen == [len(pairs)]
    assert base == cg.evaluate_retrieval(make_clip(), pairs, workers=0)
    assert adapted == cg.evaluate_retrieval(clip, pairs, workers=0)
    assert base != adapted


def test_adapted_image_towers_are_not_cached(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter on the image tower would be measured with the features of its base, or poison the base's."""
    caplog.set_level(logging.INFO, "clipgraft")
    base = encode_images(clip, pairs.images, workers=0, cache=cache)
    cg.apply_lora(clip, r=2, targets="vision-attention")
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    caplog.clear()
    adapted = encode_images(clip, pairs.images, workers=0, cache=cache)
    assert not torch.allclose(adapted, base)
    assert caplog.messages == ["image features: features are not cached, the image tower carries LoRA"]
    with cg.lora_disabled(clip):
        assert torch.equal(encode_images(clip, pairs.images, workers=0, cache=cache), base)


def test_a_preprocessing_that_cannot_be_named_is_used_without_the_cache(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    """A lambda in a transform would end the run, or take another lambda's features."""
    caplog.set_level(logging.INFO, "clipgraft")
    steps = clip.require_preprocess()
    found = encode_images(clip, pairs.images, workers=0, cache=cache, transform=lambda image: steps(image))
    assert torch.equal(found, encode_images(clip, pairs.images, workers=0, exact_preprocess=True))
    assert "features are not cached: preprocessing or tower hold" in caplog.messages[0]
    assert not cache.folder.exists()


def test_both_preprocessings_have_an_entry_of_their_own(
    clip: Clip, tmp_path: Path, cache: FeatureCache
) -> None:
    """`--exact-preprocess` would be given what the fast preprocessing made, or the other way round."""
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    alone = {exact: encode_images(clip, [path], workers=0, exact_preprocess=exact) for exact in (False, True)}
    assert not torch.equal(alone[False], alone[True])
    for exact in (False, True, False, True):
        found = encode_images(clip, [path], workers=0, cache=cache, exact_preprocess=exact)
        assert torch.equal(found, alone[exact])
    assert len(list(cache.folder.glob("*/*.npy"))) == 2


def test_runs_preprocess_as_they_are_told(
    make_clip: MakeClip, pairs: cg.Pairs, cache: FeatureCache, tmp_path: Path, seen: list[int]
) -> None:
    """`--exact-preprocess` would reach training but not evaluation, or neither."""
    fit(text_adapter(make_clip()), pairs, tmp_path / "fast", cache=cache)
    assert sum(seen) == len(pairs)
    fit(text_adapter(make_clip()), pairs, tmp_path / "exact", cache=cache, exact_preprocess=True)
    assert sum(seen) == 2 * len(pairs)
    assert "exact_preprocess: True\n" in (tmp_path / "exact" / "params.txt").read_text()
    for exact in (False, True):
        cg.evaluate_retrieval(make_clip(), pairs, workers=0, cache=cache, exact_preprocess=exact)
    assert sum(seen) == 2 * len(pairs)


def test_activations_are_stored_beside_features(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, seen: list[int]
) -> None:
    """A tower that is trained from a block on reads what the blocks below it give, not features."""
    before = encode_images(clip, pairs.images, workers=0, cache=cache)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return clip.model.visual.conv1(pixels).flatten(2).transpose(1, 2)

    features, kind = FeatureArgs(workers=0), RowKind("patches", torch.bfloat16)
    first = image_rows(clip, pairs.images, forward, features, kind, cache=cache)
    again = image_rows(clip, pairs.images, forward, features, kind, cache=cache)
    assert sum(seen) == 2 * len(pairs)
    assert first.shape == (len(pairs), 16, 32)
    ids = torch.tensor([11, 0, 5])
    assert torch.equal(first[ids], again[ids])
    steps = clip.require_preprocess()
    from clipgraft.pictures import open_image

    with torch.no_grad():
        alone = forward(torch.stack([steps(open_image(pairs.images[index])) for index in ids.tolist()]))
    torch.testing.assert_close(again[ids], alone.bfloat16(), rtol=2e-2, atol=2e-2)
    assert torch.equal(encode_images(clip, pairs.images, workers=0, cache=cache), before)
