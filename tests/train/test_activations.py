"""Image adapters on the upper blocks alone: those below run once for each image, and nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipgraft as cg
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import Clip
from clipgraft.models.openclip import OpenClipFamily
from clipgraft.train import inputs as inputs_module
from clipgraft.train.feed import LiveImages, MicroBatch, PartlyFixedImages
from clipgraft.train.inputs import Inputs, first_trained_block
from explicit_lora import randomise_lora
from fitting import groups, prepared

MakeClip = Callable[[], Clip]
ROW = 17 * 32


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """An empty cache."""
    return FeatureCache(tmp_path / "features")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets how much memory there is; none at first."""

    def has(count: int | None) -> None:
        monkeypatch.setattr(inputs_module, "available_memory", lambda: count)

    has(None)
    return has


def adapted(clip: Clip, targets: str = "vision.1.*,vision.proj", **options: Any) -> Clip:
    torch.manual_seed(0)
    cg.apply_lora(clip, r=2, targets=targets, **options)
    randomise_lora(clip.model)
    return clip


def prepare(clip: Clip, pairs: cg.Pairs, **changes: Any) -> Inputs:
    options: dict[str, Any] = {
        "batch_size": 8,
        "accum_freq": 1,
        "seed": 3,
        "augment": False,
        "encoder": Encoder(clip),
        "workers": 0,
        "progress": False,
        "exact_preprocess": True,
        **changes,
    }
    return prepared(clip, pairs, **options)


def step(clip: Clip, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor], MicroBatch]:
    """Features of the first batch, and what they give every adapter weight."""
    (batch,) = next(inputs.feed.batches(0, 0))
    clip.train()
    clip.model.zero_grad()
    features = inputs.images(batch)
    features.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in clip.model.named_parameters() if p.grad is not None}
    return features.detach(), grads, batch


@pytest.mark.parametrize("family", ["clip", "hf_clip"])
@pytest.mark.parametrize("targets", ["vision.1.*,vision.proj", "vision.1.fc2,text.0.q", "vision.proj"])
def test_features_and_gradients_are_those_of_the_whole_tower(
    family: str,
    targets: str,
    pairs: cg.Pairs,
    cache: FeatureCache,
    free: Callable[[int | None], None],
    request: pytest.FixtureRequest,
) -> None:
    """The adapter would be another one than with the tower run at every step."""
    clip = adapted(request.getfixturevalue(family), targets)
    live = prepare(clip, pairs)
    assert isinstance(live.images, LiveImages)
    wanted, gradients, pixels = step(clip, live)
    stored = prepare(clip, pairs, cache=cache)
    assert isinstance(stored.images, PartlyFixedImages)
    found, same, ids = step(clip, stored)
    assert torch.equal(pixels.image_ids, ids.image_ids)
    assert ids.pixels is None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert same.keys() == gradients.keys()
    assert len(same) == 2 * sum(site.tower == "vision" for site in require_lora(clip.model).layers)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_dropout_still_acts(clip: Clip, pairs: cg.Pairs, cache: FeatureCache) -> None:
    """`--lora-dropout` would be ignored by image adapters."""
    inputs = prepare(adapted(clip, dropout=0.5), pairs, cache=cache)
    assert not torch.equal(step(clip, inputs)[0], step(clip, inputs)[0])


@pytest.mark.parametrize(
    ("targets", "block"),
    [
        ("vision.1.q", 1),
        ("vision.proj", 1),
        ("vision.0.fc2,vision.1.q", 0),
        ("vision.patch_embedding,vision.1.q", 0),
        ("vision.position_embedding", 0),
    ],
)
def test_only_what_no_training_changes_is_stored(
    targets: str, block: int, clip: Clip, pairs: cg.Pairs, cache: FeatureCache
) -> None:
    """Blocks that train would stay as they were before the first step."""
    adapted(clip, targets)
    assert first_trained_block(clip, 2) == block
    kind = PartlyFixedImages if block else LiveImages
    assert isinstance(prepare(clip, pairs, cache=cache).images, kind)


def test_base_weights_that_train_keep_the_tower_live(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache
) -> None:
    """Whoever unfreezes a norm below the adapter would train it in vain."""
    adapted(clip).logit_scale.requires_grad_(True)
    assert first_trained_block(clip, 2) == 1
    clip.model.visual.ln_pre.weight.requires_grad_(True)
    assert isinstance(prepare(clip, pairs, cache=cache).images, LiveImages)


def test_crops_and_towers_that_are_not_known_stay_live(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random crops would be one crop for ever; a tower of another make would be computed wrongly."""
    adapted(clip)
    assert isinstance(prepare(clip, pairs, cache=cache, augment=True).images, LiveImages)
    monkeypatch.setattr(OpenClipFamily, "vision_tower", lambda self, model: None)
    assert isinstance(prepare(clip, pairs, cache=cache).images, LiveImages)


def test_where_activations_are_kept_and_why(
    clip: Clip,
    pairs: cg.Pairs,
    cache: FeatureCache,
    tmp_path: Path,
    free: Callable[[int | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A disk or the memory would be filled without a word, or a run be slow for no visible reason."""
    caplog.set_level(logging.INFO, "clipgraft")
    adapted(clip)
    total = 4 * ROW * len(pairs)

    def told(**options: Any) -> str:
        caplog.clear()
        prepare(clip, pairs, **options)
        (line,) = [line for line in caplog.messages if "the image tower is frozen below block 1 of 2" in line]
        return line

    assert told(cache=cache).endswith(
        "the input of that block is computed once, 12 images x 2.2 kB = 0.0 MB in the feature cache"
    )
    assert "input of vision block 1: 12 images, 0 from the cache, 12 encoded" in caplog.messages
    tight = FeatureCache(tmp_path / "tight", max_bytes=total)
    free(4 * total)
    assert "computed once, 12 images x 2.2 kB = 0.0 MB in memory (0.0 MB of features would not" in told(
        cache=tight
    )
    assert "in memory (there is no feature cache)" in told()
    free(4 * total - 1)
    line = told(cache=tight)
    assert "all of it runs at every step" in line
    assert line.endswith("raise `cache_gb`")
    assert "there is no feature cache" in told()
    assert not tight.folder.exists()
    told(cache=cache)
    assert "input of vision block 1: 12 images, 12 from the cache, 0 encoded" in caplog.messages


def test_memory_gives_what_the_cache_gives(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, free: Callable[[int | None], None]
) -> None:
    """`--feature-cache none` would be a setting that decides what is trained."""
    adapted(clip)
    free(10**9)
    kept, stored = prepare(clip, pairs), prepare(clip, pairs, cache=cache)
    assert torch.equal(step(clip, kept)[0], step(clip, stored)[0])


def test_bf16_halves_what_is_stored(clip: Clip, pairs: cg.Pairs, cache: FeatureCache) -> None:
    """A run in bf16 would read twice the bytes at each step; rounded once, features must stay close."""
    adapted(clip)
    inputs = prepare(clip, pairs, cache=cache, encoder=Encoder(clip, autocast=True))
    assert isinstance(inputs.images, PartlyFixedImages)
    assert inputs.images.inputs.dtype == torch.bfloat16
    (batch,) = next(inputs.feed.batches(0, 0))
    with torch.no_grad():
        found, wanted = inputs.images(batch), prepare(clip, pairs, cache=cache).images(batch)
    assert torch.cosine_similarity(found, wanted).min() > 0.999


def test_validation_is_of_the_tower_as_it_is(
    clip: Clip, pairs: cg.Pairs, cache: FeatureCache, tmp_path: Path
) -> None:
    """Validation would show the image tower as it was before training, or other images."""
    few = cg.Pairs(pairs.images[3:8], pairs.captions[3:8])
    inputs = prepare(adapted(clip, dropout=0.5), pairs, val=few, cache=cache)
    assert inputs.val_images is not None
    clip.train()
    for _ in range(2):
        wanted = encode_images(clip, few.images, workers=0, exact_preprocess=True)
        torch.testing.assert_close(inputs.val_images(), wanted, rtol=1e-4, atol=1e-5)
        assert clip.model.training
        with torch.no_grad():
            for name, parameter in clip.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2)


def test_a_run_is_measured_as_it_is_evaluated_later(
    make_clip: MakeClip, pairs: cg.Pairs, cache: FeatureCache, tmp_path: Path
) -> None:
    """The metrics of a run would not be those of `clipgraft eval` on what it saved."""
    clip = make_clip()
    cg.apply_lora(clip, r=2, targets="vision.1.*", dropout=0.1)
    options: dict[str, Any] = {"batch_size": 8, "epochs": 2, "lr": 1e-2, "workers": 0, "progress": False}
    result = cg.fit(clip, pairs, pairs, **groups(out=tmp_path / "run", cache=cache, **options))
    fresh = make_clip()
    cg.load_adapter(fresh, result.saved)
    later = cg.evaluate_retrieval(fresh, pairs, workers=0)
    assert {name: result.history[-1][name] for name in later} == pytest.approx(later)
