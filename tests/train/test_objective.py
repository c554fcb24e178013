"""The loss against a loop over pairs, and against open_clip's where both must agree."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from open_clip.loss import ClipLoss

from clipgraft.train.recipes.pair_losses import SoftmaxLoss, false_negatives


def naive_loss(
    images: Any, texts: Any, log_scale: float, image_ids: list[int], caption_ids: list[int]
) -> float:
    """Cross entropy by hand: every pair against every pair that is a real negative of it, both ways."""

    def unit(rows: Any) -> list[list[float]]:
        return [[value / math.hypot(*row) for value in row] for row in rows.tolist()]

    def similarity(a: list[float], b: list[float]) -> float:
        return math.exp(log_scale) * sum(x * y for x, y in zip(a, b, strict=True))

    left, right, total = unit(images), unit(texts), 0.0
    count = len(left)
    for i in range(count):
        others = [
            j
            for j in range(count)
            if j != i and image_ids[i] != image_ids[j] and caption_ids[i] != caption_ids[j]
        ]
        own = similarity(left[i], right[i])
        to_texts = [own, *(similarity(left[i], right[j]) for j in others)]
        to_images = [own, *(similarity(left[j], right[i]) for j in others)]
        for row in (to_texts, to_images):
            top = max(row)
            total += top + math.log(sum(math.exp(value - top) for value in row)) - own
    return total / (2 * count)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_loss_equals_the_loop_over_pairs(data: st.DataObject) -> None:
    """A wrong mask trains the model to push an image away from its own other captions."""
    count = data.draw(st.integers(2, 8))
    ids = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    image_ids, caption_ids = data.draw(ids), data.draw(ids)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    images, texts = (torch.randn(count, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    log_scale = torch.tensor(data.draw(st.floats(0, 4)))
    loss = SoftmaxLoss(log_scale)(images, texts, torch.tensor(image_ids), torch.tensor(caption_ids))
    wanted = naive_loss(images, texts, log_scale.item(), image_ids, caption_ids)
    assert loss.item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_loss_is_open_clips_without_duplicates() -> None:
    """Runs without repeated images or captions would not be comparable with open_clip's."""
    images, texts = (torch.nn.functional.normalize(torch.randn(16, 8), dim=-1) for _ in range(2))
    log_scale = torch.tensor(2.6, requires_grad=True)
    ids = torch.arange(16)
    ours = SoftmaxLoss(log_scale)(images, texts, ids, ids)
    theirs = ClipLoss()(images, texts, log_scale.exp())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, log_scale)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_two_pairs_of_one_image_do_not_repel() -> None:
    """Five captions an image (Flickr8k) in one batch would fight each other."""
    images = torch.randn(2, 4)
    texts = torch.randn(2, 4, requires_grad=True)
    same_image = SoftmaxLoss(torch.tensor(1.0))(images, texts, torch.tensor([7, 7]), torch.tensor([0, 1]))
    assert same_image.item() == pytest.approx(0, abs=1e-7)
    (gradient,) = torch.autograd.grad(same_image, texts)
    assert gradient.abs().max() < 1e-7


def test_a_pair_is_never_masked_with_itself() -> None:
    """A masked diagonal makes the loss infinite at the first repeated caption."""
    ids = torch.zeros(4, dtype=torch.long)
    assert not false_negatives(ids, ids).diagonal().any()
    assert false_negatives(ids, ids).sum() == 12


def test_half_precision_features_give_an_fp32_loss() -> None:
    """Under bf16 the softmax over a large batch would lose most of its digits."""
    features = torch.randn(4, 8, dtype=torch.bfloat16)
    ids = torch.arange(4)
    loss = SoftmaxLoss(torch.tensor(2.0, dtype=torch.bfloat16))(features, features, ids, ids)
    assert loss.dtype == torch.float32
