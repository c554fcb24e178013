"""The sigmoid loss against a loop over pairs in fp64, open_clip's and transformers' own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from open_clip.loss import SigLipLoss
from torch import Tensor

import clipgraft as cg
from clipgraft.models.clip import Clip, as_clip
from clipgraft.train.recipes.gallery import Gallery, partners_of
from clipgraft.train.recipes.pair_losses import SigmoidLoss, SoftmaxLoss, choose_loss, make_pair_loss
from tiny_siglip import build_siglip, siglip_clip, with_logit_bias

IDS = torch.arange(9)


def explicit(
    images: Tensor, texts: Tensor, scale: float, bias: float, signs: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients written out: by a logit, -z sigmoid(-z logit) / N; z is 0 where it is left out."""
    left, right = (rows / rows.norm(dim=1, keepdim=True) for rows in (images, texts))
    cosines = left @ right.T
    logits = math.exp(scale) * cosines + bias
    count = len(images)
    total = sum(
        math.log1p(math.exp(-z * logit))
        for z, logit in zip(signs.flatten().tolist(), logits.flatten().tolist(), strict=True)
        if z
    )
    by_logit = -signs / (1 + torch.exp(signs * logits)) / count
    units = math.exp(scale) * by_logit @ right, math.exp(scale) * by_logit.T @ left

    def through_norm(rows: Tensor, unit: Tensor, by_unit: Tensor) -> Tensor:
        return (by_unit - unit * (unit * by_unit).sum(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)

    return total / count, {
        "images": through_norm(images, left, units[0]),
        "texts": through_norm(texts, right, units[1]),
        "scale": (by_logit * math.exp(scale) * cosines).sum(),
        "bias": by_logit.sum(),
    }


def signs_of(image_ids: list[int], caption_ids: list[int]) -> Tensor:
    """1 for a pair with itself, 0 where two pairs share the image or the caption, else -1."""
    rows = range(len(image_ids))
    shared = [[image_ids[i] == image_ids[j] or caption_ids[i] == caption_ids[j] for j in rows] for i in rows]
    values = [[1.0 if i == j else 0.0 if shared[i][j] else -1.0 for j in rows] for i in rows]
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(count, 5, generator=generator, dtype=dtype) for _ in range(2))
    return images.requires_grad_(), texts.requires_grad_()


@settings(max_examples=60)
@given(st.data())
def test_loss_and_gradients_are_the_formulas(data: st.DataObject) -> None:
    """A wrong sign, mask or divisor trains another model than SigLIP's loss does."""
    count = data.draw(st.integers(1, 8))
    ids = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    image_ids, caption_ids = data.draw(ids), data.draw(ids)
    images, texts = random_pairs(count, data.draw(st.integers(0, 1000)))
    scale = torch.tensor(data.draw(st.floats(0, 5)), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([data.draw(st.floats(-15, 5))], dtype=torch.float64, requires_grad=True)
    loss = SigmoidLoss(scale, bias)(images, texts, torch.tensor(image_ids), torch.tensor(caption_ids))
    loss.backward()
    wanted, gradients = explicit(
        images.detach(), texts.detach(), scale.item(), bias.item(), signs_of(image_ids, caption_ids)
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-10)
    for name, tensor in {"images": images, "texts": texts, "scale": scale, "bias": bias}.items():
        assert tensor.grad is not None
        torch.testing.assert_close(
            tensor.grad.squeeze(), gradients[name].squeeze(), rtol=1e-9, atol=1e-12, msg=name
        )


def test_loss_is_open_clips_without_duplicates() -> None:
    """Runs without repeated images or captions would not be comparable with open_clip's `--siglip`."""
    images, texts = random_pairs(16, 0)
    scale = torch.tensor(4.7, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-12.9, dtype=torch.float64, requires_grad=True)
    ours = SigmoidLoss(scale, bias)(images, texts, torch.arange(16), torch.arange(16))
    theirs = SigLipLoss()(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale.exp(), bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(loss, (images, texts, scale, bias)) for loss in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def test_loss_is_the_one_that_transformers_computes() -> None:
    """A SigLIP of transformers would be tuned by another loss than its own."""
    model = build_siglip().double()
    tokens, pixels = torch.randint(1, 98, (6, 16)), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    clip, ids = as_clip(model), torch.arange(6)
    with torch.no_grad():
        theirs = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
        features = clip.encode_image(pixels), clip.encode_text(tokens)
        ours = make_pair_loss(clip, choose_loss(clip, "auto"))(*features, ids, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


@settings(max_examples=40)
@given(st.data())
def test_gallery_equals_the_loop_over_queries(data: st.DataObject) -> None:
    """A caption would be pushed away from another image of its own, or its match count more than once."""
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=12))
    queries, rows = (list(part) for part in zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    features = F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=-1)
    texts = torch.randn(len(pairs), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    partners = partners_of(queries, rows, 5)
    loss = SigmoidLoss(torch.tensor(2.0), torch.tensor(-3.0), Gallery("images", features, partners))(
        texts.new_empty(len(pairs), 5), texts, torch.tensor(rows), torch.tensor(queries)
    )
    total = 0.0
    for query, who, own in zip(F.normalize(texts.detach(), dim=-1), queries, rows, strict=True):
        for row, image in enumerate(features):
            logit = math.exp(2) * float(query @ image) - 3
            if row == own:
                total += math.log1p(math.exp(-logit))
            elif row not in partners[who]:
                total += math.log1p(math.exp(logit)) * (len(pairs) - 1) / 6
    assert loss.item() == pytest.approx(total / len(pairs), rel=1e-6)
    loss.backward()
    assert texts.grad is not None
    assert texts.grad.isfinite().all()


@pytest.mark.parametrize("of", ["images", "texts"])
def test_a_batch_that_is_the_gallery_has_the_batch_loss(of: Any) -> None:
    """The two kinds of negatives would not be two sizes of one thing."""
    images, texts = random_pairs(9, 0)
    scale, bias = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    fixed = images if of == "images" else texts
    gallery = Gallery(of, F.normalize(fixed.detach(), dim=-1), [(row,) for row in range(9)])
    found = SigmoidLoss(scale, bias, gallery)(images, texts, IDS, IDS)
    torch.testing.assert_close(found, SigmoidLoss(scale, bias)(images, texts, IDS, IDS), rtol=1e-12, atol=0)


def test_gallery_is_the_mean_over_batches() -> None:
    """A run over a gallery would want another learning rate and another bias than one over batches."""
    images, texts = random_pairs(6, 0)
    scale, bias = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    gallery = Gallery("images", F.normalize(images.detach(), dim=-1), [(row,) for row in range(6)])
    over_batch, over_gallery = SigmoidLoss(scale, bias), SigmoidLoss(scale, bias, gallery)
    batches = [torch.tensor(rows) for rows in itertools.combinations(range(6), 3)]
    found, wanted = (
        torch.stack([loss(images[rows], texts[rows], rows, rows) for rows in batches]).mean()
        for loss in (over_gallery, over_batch)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, texts)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_half_precision_features_give_an_fp32_loss() -> None:
    """Under bf16 the sum over all pairs of a batch would lose most of its digits."""
    images, texts = (rows.detach() for rows in random_pairs(9, 0, torch.bfloat16))
    loss = SigmoidLoss(torch.tensor(2.0), torch.tensor(-10.0, dtype=torch.bfloat16))(images, texts, IDS, IDS)
    assert loss.dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    """A confident SigLIP, whose logits are beyond ±100, would end a run with a loss that is no number."""
    images, texts = random_pairs(9, 0, torch.float32)
    loss = SigmoidLoss(torch.tensor(8.0), torch.tensor(-500.0))(images, texts, IDS, torch.zeros(9).long())
    loss.backward()
    assert loss.isfinite()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_auto_is_the_loss_that_the_base_was_made_by(clip: Clip) -> None:
    """A SigLIP would silently be tuned by CLIP's loss, or a CLIP by one that it has no bias for."""
    for other in (siglip_clip(), with_logit_bias(clip)):
        assert choose_loss(other, "auto") == choose_loss(other, "sigmoid") == "sigmoid"
        assert choose_loss(other, "softmax") == "softmax"
        assert isinstance(make_pair_loss(other, "sigmoid"), SigmoidLoss)
    assert choose_loss(clip, "auto") == "softmax"
    assert isinstance(make_pair_loss(clip, "softmax"), SoftmaxLoss)


def test_sigmoid_without_a_bias_is_refused(clip: Clip) -> None:
    """Every pair of a batch would begin as a match, and a bias that was added has no place in any file."""
    with pytest.raises(cg.errors.ConfigError, match=r"this base has no `logit_bias`.*use `loss=softmax`"):
        choose_loss(clip, "sigmoid")
