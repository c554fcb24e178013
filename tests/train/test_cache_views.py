"""`--augment` with a frozen image tower: new crops at every step, or K crops that are encoded once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_images
from clipgraft.data.loading import SeededView
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.train.inputs import Inputs
from fitting import groups, prepared

MakeClip = Callable[[], Clip]


@pytest.fixture
def clip(make_clip: MakeClip) -> Clip:
    """The tiny base with a text adapter: its image tower is frozen."""
    clip = make_clip()
    torch.manual_seed(0)
    cg.apply_lora(clip, r=2, dropout=0.1)
    return clip


def prepare(clip: Clip, pairs: cg.Pairs, **changes: Any) -> Inputs:
    options: dict[str, Any] = {
        "batch_size": 6,
        "accum_freq": 1,
        "seed": 3,
        "augment": True,
        "encoder": Encoder(clip),
        "workers": 0,
        "progress": False,
        **changes,
    }
    return prepared(clip, pairs, **options)


def test_each_turn_has_its_view(clip: Clip, pairs: cg.Pairs) -> None:
    """An image would be trained with another's crop, or with one view only."""
    inputs = prepare(clip, pairs, cache_views=3)
    views = [
        encode_images(clip, pairs.images, workers=0, transform=SeededView(clip.preprocess_train, 3, number))
        for number in range(3)
    ]
    assert not torch.allclose(views[0], views[1], atol=1e-4)
    for epoch in (0, 4):
        for (batch,) in inputs.feed.batches(epoch, 0):
            assert batch.pixels is None
            found = inputs.images(batch)
            for row, image, turn in zip(found, batch.image_ids, batch.turns, strict=True):
                assert torch.equal(row, views[int(turn) % 3][image])


def test_views_are_encoded_once_for_all_runs(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second run would encode K times as much as one without augmentation."""
    caplog.set_level(logging.INFO, "clipgraft")
    cache = FeatureCache(tmp_path / "features")
    first = prepare(clip, pairs, cache=cache, cache_views=2)
    caplog.clear()
    second = prepare(clip, pairs, cache=cache, cache_views=3)
    assert [line for line in caplog.messages if "from the cache" in line] == [
        "training images, view 1: 12 images, 12 from the cache, 0 encoded",
        "training images, view 2: 12 images, 12 from the cache, 0 encoded",
        "training images, view 3: 12 images, 0 from the cache, 12 encoded",
    ]
    alone = prepare(clip, pairs, cache_views=2)
    (batch,) = next(first.feed.batches(0, 0))
    assert torch.equal(first.images(batch), alone.images(batch))
    caplog.clear()
    prepare(clip, pairs, cache=cache, cache_views=2, seed=4)
    assert "training images, view 1: 12 images, 0 from the cache, 12 encoded" in caplog.messages
    assert not torch.equal(second.images.features[0], second.images.features[1])  # type: ignore[attr-defined]


def test_without_views_every_step_crops_anew(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`--augment` would be accepted and do nothing, or the user would not know why the run is slow."""
    caplog.set_level(logging.INFO, "clipgraft")
    cache = FeatureCache(tmp_path / "features")
    inputs = prepare(clip, pairs, cache=cache, val=pairs)
    (line,) = [line for line in caplog.messages if "`augment`" in line]
    assert "features are not cached" in line
    assert any(line.startswith("`cache_views=K`") for line in caplog.messages)
    assert not any(line.startswith("training images") for line in caplog.messages)
    assert "validation images: 12 images, 0 from the cache, 12 encoded" in caplog.messages
    (first,), (later,) = next(inputs.feed.batches(0, 0)), next(inputs.feed.batches(1, 0))
    assert first.pixels is not None
    clip.train()
    features = inputs.images(first)
    assert not features.requires_grad
    assert clip.model.visual.training
    with torch.no_grad():
        torch.testing.assert_close(features, clip.encode_image(first.pixels), rtol=1e-4, atol=1e-5)
    seen = {int(image): pixels for image, pixels in zip(first.image_ids, first.pixels, strict=True)}
    assert later.pixels is not None
    again = [(seen[int(i)], p) for i, p in zip(later.image_ids, later.pixels, strict=True) if int(i) in seen]
    assert again
    assert not all(torch.equal(before, now) for before, now in again)


def test_augmented_runs_train(make_clip: MakeClip, clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Both ways of augmenting must reach the loss, and differ from no augmentation."""
    found = []
    ways: dict[str, Any] = {"plain": {}, "live": {"augment": True}}
    ways["kept"] = {"augment": True, "cache_views": 2}
    for name, options in ways.items():
        fresh = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(fresh, r=2)
        settings: dict[str, Any] = {"batch_size": 6, "epochs": 1, "lr": 1e-2, "workers": 0, "accum_freq": 2}
        result = cg.fit(fresh, pairs, **groups(out=tmp_path / name, progress=False, **settings, **options))
        found.append((result.saved / "adapter_model.safetensors").read_bytes())
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"augment": False, "cache_views": 2}, "`cache_views` given without `augment`"),
    ],
)
def test_what_contradicts_itself_is_refused(
    clip: Clip, pairs: cg.Pairs, options: dict[str, Any], told: str
) -> None:
    """A setting would be ignored without a word."""
    with pytest.raises(cg.errors.ConfigError, match=told):
        prepare(clip, pairs, **options)


def test_views_of_a_trained_image_tower_are_refused(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """Features of a tower that changes at every step cannot be kept."""
    clip = make_clip()
    cg.apply_lora(clip, r=2, targets="vision-attention")
    with pytest.raises(cg.errors.ConfigError, match="this run trains it: drop `cache_views`"):
        prepare(clip, pairs, cache_views=2)


def test_a_base_without_crops_is_named(hf_clip: Clip, pairs: cg.Pairs) -> None:
    """transformers bases bring no augmenting transform: `--augment` would be accepted and do nothing."""
    cg.apply_lora(hf_clip, r=2)
    for options in ({}, {"cache_views": 2}):
        with pytest.raises(cg.errors.ConfigError, match="brings no augmenting transform"):
            prepare(hf_clip, pairs, **options)
