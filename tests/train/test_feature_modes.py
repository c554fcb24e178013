"""Classifiers made of the features of a few images, beside their formulas written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.evaluate.classification import class_features, evaluate_classification
from clipgraft.models.clip import Clip
from clipgraft.train.fewshot.args import FeatureModeArgs
from clipgraft.train.fewshot.features import (
    FewShotFeatures,
    Projection,
    few_shot_features,
    projection_of,
    tower_features,
    zero_shot,
)
from clipgraft.train.fewshot.modes import FEATURE_MODES
from clipgraft.train.fewshot.prolip import attach_projection

Array = npt.NDArray[np.float64]
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def features() -> FewShotFeatures:
    """Two views of nine images of three classes, a projection from 6 to 5 numbers."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 9, 6, generator=generator)
    texts = F.normalize(torch.randn(3, 5, generator=generator), dim=-1)
    projection = Projection(torch.randn(5, 6, generator=generator) * 0.3)
    return FewShotFeatures(views, torch.tensor([0, 1, 2] * 3), texts, CLASSES, 10.0, projection)


@pytest.fixture
def images() -> torch.Tensor:
    """Seven more images."""
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def probabilities(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_tip_adapter_is_its_formula(features: FewShotFeatures, images: torch.Tensor) -> None:
    """Tip-Adapter answers something else than s·f·Wᵀ + α·exp(-β(1 - f·Fᵀ))·L of the paper."""
    options = FeatureModeArgs(cache_weight=1.7, cache_sharpness=4.0)
    made = FEATURE_MODES["tip-adapter"].fit(features, options, 0)
    weight, texts = features.projection.weight.double().numpy(), features.texts.double().numpy()
    cached = unit(unit(features.views.double().numpy() @ weight.T).mean(0))
    queries = unit(images.double().numpy() @ weight.T)
    wanted = np.zeros((7, 3))
    for row, query in enumerate(queries):
        for label in range(3):
            wanted[row, label] = 10.0 * query @ texts[label]
        for key, label in zip(cached, features.labels.tolist(), strict=True):
            wanted[row, label] += 1.7 * np.exp(-4.0 * (1 - query @ key))
    np.testing.assert_allclose(made.logits(images).numpy(), wanted, atol=2e-5)
    assert made.trained_weights == 0


def test_tip_adapter_f_starts_as_tip_adapter(features: FewShotFeatures, images: torch.Tensor) -> None:
    """Tip-Adapter-F trains from another start, trains nothing, or another time gives other bits."""
    tip, mode = FEATURE_MODES["tip-adapter"], FEATURE_MODES["tip-adapter-f"]
    start = tip.fit(features, FeatureModeArgs(), 0)
    untrained = mode.fit(features, FeatureModeArgs(feature_epochs=0), 0)
    assert torch.equal(untrained.logits(images), start.logits(images))
    trained = mode.fit(features, FeatureModeArgs(), 0)
    assert torch.equal(trained.logits(images), mode.fit(features, FeatureModeArgs(), 0).logits(images))
    first = features.views[0]
    before, after = (F.cross_entropy(c.logits(first), features.labels) for c in (start, trained))
    assert after < before
    assert trained.trained_weights == 9 * 5


def test_prolip_steps_are_adam_on_its_loss(features: FewShotFeatures, images: torch.Tensor) -> None:
    """ProLIP's loss or gradient is not cross-entropy + λ·‖W - W₀‖², with λ = 1/shots."""
    start, texts = features.projection.weight.double().numpy(), features.texts.double().numpy()
    labels, shots, epochs = features.labels.numpy(), 3, 4

    def loss(weight: Array, view: Array) -> float:
        chances = probabilities(10.0 * unit(view @ weight.T) @ texts.T)
        own = np.log(chances[np.arange(9), labels])
        return float(-own.mean() + ((weight - start) ** 2).sum() / shots)

    weight, mean, square = start.copy(), np.zeros((5, 6)), np.zeros((5, 6))
    for step in range(epochs):
        view, gradient = features.views[step % 2].double().numpy(), np.zeros((5, 6))
        for place in np.ndindex(5, 6):
            moved = np.zeros((5, 6))
            moved[place] = 1e-6
            gradient[place] = (loss(weight + moved, view) - loss(weight - moved, view)) / 2e-6
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = 0.02 * (1 + np.cos(np.pi * step / epochs)) / 2
        unbiased = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-4
        weight -= rate * mean / (1 - 0.9 ** (step + 1)) / unbiased
    made = FEATURE_MODES["prolip"].fit(features, FeatureModeArgs(feature_epochs=epochs, feature_lr=0.02), 0)
    wanted = 10.0 * unit(images.double().numpy() @ weight.T) @ texts.T
    np.testing.assert_allclose(made.logits(images).numpy(), wanted, atol=2e-4)
    assert np.abs(wanted - zero_shot(features).logits(images).numpy()).max() > 0.1
    assert made.trained_weights == 30


def test_prolip_held_firmly_is_zero_shot(features: FewShotFeatures, images: torch.Tensor) -> None:
    """A large penalty does not hold the projection, so that a careful user still loses zero-shot."""
    held = FEATURE_MODES["prolip"].fit(features, FeatureModeArgs(penalty=1e6), 0)
    free = FEATURE_MODES["prolip"].fit(features, FeatureModeArgs(penalty=0), 0)
    wanted = zero_shot(features).logits(images)
    assert (held.logits(images) - wanted).abs().max() < 1e-2
    assert (free.logits(images) - wanted).abs().max() > 0.1


def test_the_linear_probe_is_at_its_minimum(features: FewShotFeatures, images: torch.Tensor) -> None:
    """The linear probe stops before its minimum, or is not zero-shot where it made no step."""
    mode = FEATURE_MODES["linear-probe"]
    untrained = mode.fit(features, FeatureModeArgs(feature_epochs=0), 0)
    assert torch.equal(untrained.logits(images), zero_shot(features).logits(images))
    made: Any = mode.fit(features, FeatureModeArgs(), 0)
    weights, texts = made.weights.double().numpy(), features.texts.double().numpy()
    seen = unit(features.views.double().numpy() @ features.projection.weight.double().numpy().T)
    seen = seen.reshape(18, 5)
    missing = np.eye(3)[np.tile(features.labels.numpy(), 2)] - probabilities(10.0 * seen @ weights.T)
    np.testing.assert_allclose(weights - texts, 0.5 * 3 / 18 * missing.T @ seen, atol=1e-5)
    assert np.abs(weights - texts).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 0] * 3)}, "1 of 3 classes have no training image: owl"),
        ({"labels": torch.tensor([0, 1, 3] * 3)}, r"labels run from 0 to 3, outside 0\.\.2"),
        ({"labels": torch.tensor([0, -1, 2] * 3)}, r"labels run from -1 to 2, outside 0\.\.2"),
        ({"views": torch.full((2, 9, 6), torch.nan)}, "image features: NaN or infinity in 18 of 18 rows"),
        ({"texts": torch.full((3, 5), torch.inf)}, "class texts: NaN or infinity in 3 of 3 rows"),
        ({"projection": Projection()}, r"the projection is \(6, 6\), but images and texts need \(5, 6\)"),
        ({"classes": ("cat", "dog")}, "texts of 3 classes for 2 class names"),
    ],
)
def test_what_is_refused(features: FewShotFeatures, changes: dict[str, Any], message: str) -> None:
    """Features that no classifier can be made of end in a wrong one, or in a traceback."""
    with pytest.raises(cg.errors.DataError, match=message):
        replace(features, **changes)


@pytest.fixture
def labelled(pairs: cg.Pairs) -> Labelled:
    """Twelve pictures, of three classes."""
    return Labelled(pairs.images, (0, 1, 2) * 4, CLASSES)


PROMPTS = (("a cat",), ("a dog", "some dog"), ("an owl",))


@pytest.mark.parametrize("base", ["make_clip", "hf_folder"])
def test_prolip_is_an_adapter(base: str, request: Any, labelled: Labelled, tmp_path: Path) -> None:
    """What ProLIP learnt answers differently once it is saved and opened as an adapter."""
    source = request.getfixturevalue(base)

    def load() -> Clip:
        return cg.load(str(source)) if base == "hf_folder" else source()

    clip = load()
    few = few_shot_features(clip, labelled, class_features(clip, PROMPTS))
    encoded = tower_features(clip, labelled.images)
    plain = evaluate_classification(clip, labelled, PROMPTS)
    told = zero_shot(few).logits(encoded)
    assert F.cross_entropy(told, few.labels).item() == pytest.approx(plain.metrics["loss"], abs=1e-5)
    made: Any = FEATURE_MODES["prolip"].fit(few, FeatureModeArgs(feature_lr=1e-2, feature_epochs=50), 0)
    attach_projection(clip, made)
    assert torch.allclose(projection_of(clip).weight, made.projection.weight, atol=1e-6)
    with pytest.raises(cg.errors.AdapterError, match="an adapter acts, 'prolip'"):
        attach_projection(clip, made, "again")
    cg.save_adapter(clip, tmp_path / "adapter")
    other = load()
    cg.load_adapter(other, tmp_path / "adapter")
    found = evaluate_classification(other, labelled, PROMPTS).metrics
    wanted = F.cross_entropy(made.logits(encoded), few.labels).item()
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)
    assert wanted < plain.metrics["loss"] - 0.05


def test_prolip_cut_to_a_rank_is_the_nearest(make_clip: Callable[[], Clip], labelled: Labelled) -> None:
    """A smaller adapter of ProLIP is further from what was learnt than it has to be."""
    clip = make_clip()
    few = few_shot_features(clip, labelled, class_features(clip, PROMPTS))
    made: Any = FEATURE_MODES["prolip"].fit(few, FeatureModeArgs(feature_lr=1e-2, feature_epochs=50), 0)
    attach_projection(clip, made, rank=2)
    u, s, v = torch.linalg.svd(made.projection.weight - few.projection.weight, full_matrices=False)
    wanted = few.projection.weight + (u[:, :2] * s[:2]) @ v[:2]
    assert torch.allclose(projection_of(clip).weight, wanted, atol=1e-5)
