"""Weights of prompts, beside a plain mean and beside a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_captions
from clipgraft.data.prompts import WeightedPrompts
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.classification import class_features, evaluate_classification
from clipgraft.models.clip import Clip
from clipgraft.train.fewshot.prompt_weights import learn_prompt_weights

CLASSES = ("cat", "dog", "owl")
PROMPTS = tuple((f"a photo of a {name}.", f"{name}s, seen in the zoo") for name in CLASSES)


def weighted(*weights: float) -> tuple[WeightedPrompts, ...]:
    return tuple(WeightedPrompts(group, weights) for group in PROMPTS)


@pytest.fixture
def labelled(pairs: cg.Pairs) -> Labelled:
    """Twelve pictures, of three classes."""
    return Labelled(pairs.images, (0, 1, 2) * 4, CLASSES)


def test_equal_weights_are_the_plain_mean(clip: Clip) -> None:
    """A file of equal weights changes the numbers of the ensemble that it stands for."""
    plain = class_features(clip, PROMPTS)
    for weight in (1.0, 0.3, 7.0):
        assert torch.equal(class_features(clip, weighted(weight, weight)), plain)


def test_a_weighted_mean_is_its_formula(clip: Clip) -> None:
    """A class is not normalise(Σ w·text)."""
    texts = encode_captions(clip, [text for group in PROMPTS for text in group]).double().numpy()
    means = np.stack([0.2 * texts[2 * index] + 0.6 * texts[2 * index + 1] for index in range(3)])
    wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(class_features(clip, weighted(0.2, 0.6)).numpy(), wanted, atol=1e-6)
    alone = class_features(clip, tuple(group[1:] for group in PROMPTS))
    assert torch.allclose(class_features(clip, weighted(0, 5)), alone, atol=1e-6)


def test_no_weights_do_better(clip: Clip, labelled: Labelled) -> None:
    """Learnt weights are worse on their own training data than others that a search finds."""
    encoder = Encoder(clip)
    texts = class_features(encoder, weighted(0.3, 0.7))[torch.tensor(labelled.labels)]
    noise = torch.randn(12, 24, generator=torch.Generator().manual_seed(0))
    images = F.normalize(texts + 0.02 * noise, dim=-1)

    def loss(prompts: tuple[WeightedPrompts, ...]) -> float:
        cosines = images.double() @ class_features(encoder, prompts).double().T
        labels = torch.tensor(labelled.labels)
        scales = torch.logspace(-4, 4, 200, dtype=torch.float64)
        return min(F.cross_entropy(scale * cosines, labels).item() for scale in scales)

    made = learn_prompt_weights(encoder, labelled, PROMPTS, images, shared=True)
    assert len({group.weights for group in made.prompts}) == 1
    assert sum(made.prompts[0].weights) == pytest.approx(2, abs=1e-3)
    searched = [loss(weighted(share, 1 - share)) for share in np.linspace(0, 1, 21)]
    assert loss(made.prompts) <= min(searched) + 1e-4 < searched[10] - 1e-4
    each = learn_prompt_weights(encoder, labelled, PROMPTS, images, shared=False)
    assert loss(each.prompts) <= loss(made.prompts) + 1e-4
    told = evaluate_classification(clip, labelled, each.prompts, image_features=images).metrics
    assert each.learnt.metrics == pytest.approx(told, abs=1e-5)


def test_nothing_to_weigh_is_refused(clip: Clip, labelled: Labelled) -> None:
    """One prompt a class ends in a file of weights that do nothing."""
    images = F.normalize(torch.ones(12, 24), dim=-1)
    with pytest.raises(cg.errors.DataError, match="every class has one prompt"):
        learn_prompt_weights(Encoder(clip), labelled, [("a",), ("b",), ("c",)], images, shared=False)
    with pytest.raises(cg.errors.DataError, match="classes differ in the number of prompts"):
        learn_prompt_weights(Encoder(clip), labelled, [("a",), ("b", "d"), ("c",)], images, shared=True)
