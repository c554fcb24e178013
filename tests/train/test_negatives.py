"""Negatives from all of a frozen tower's features, against a loop over queries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train.recipes.gallery import Gallery, partners_of
from clipgraft.train.recipes.pair_losses import SoftmaxLoss, one_way_losses
from fitting import groups


def naive(
    queries: Tensor, gallery: Tensor, partners: list[set[int]], ids: list[int], own: list[int]
) -> float:
    """Cross-entropy by hand, at temperature 1 / e."""
    total = 0.0
    for query, who, label in zip(F.normalize(queries, dim=-1), ids, own, strict=True):
        scores = [math.e * float(query @ row) for row in gallery]
        kept = [s for row, s in enumerate(scores) if row == label or row not in partners[who]]
        total += math.log(sum(map(math.exp, kept))) - scores[label]
    return total / len(ids)


@settings(max_examples=50)
@given(st.data())
def test_loss_equals_the_loop_over_queries(data: st.DataObject) -> None:
    """A caption would be pushed away from another image that it describes too."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=12))
    gallery = F.normalize(torch.randn(7, 5, generator=generator), dim=-1)
    queries, rows = (list(part) for part in zip(*pairs, strict=True))
    partners = partners_of(queries, rows, 5)
    features = torch.randn(len(pairs), 5, generator=generator, requires_grad=True)
    logits, labels = Gallery("images", gallery, partners).logits(
        features, torch.tensor(queries), torch.tensor(rows), torch.tensor(1.0)
    )
    loss = F.cross_entropy(logits, labels)
    wanted = naive(features.detach(), gallery, [set(p) for p in partners], queries, rows)
    assert loss.item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    loss.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_a_part_of_a_large_gallery_holds_the_right_rows() -> None:
    """With a million images the loss would be that of other pairs than the batch's."""
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(500, 8, generator=generator), dim=-1)
    queries, own = torch.randn(6, 8, generator=generator), torch.tensor([3, 499, 250, 3, 77, 0])
    partners = [(row, 7, 8) for row in own.tolist()]
    ids = torch.arange(6)
    part, whole = Gallery("images", gallery, partners, most=100), Gallery("images", gallery, partners)
    torch.manual_seed(0)
    asked = queries, ids, own, torch.tensor(2.0)
    losses = [F.cross_entropy(*part.logits(*asked)).item() for _ in range(50)]
    everything = F.cross_entropy(*whole.logits(*asked)).item()
    # About a fifth of the rows: log(5) less, drawn anew each time.
    assert len(set(losses)) > 40
    assert sum(losses) / 50 == pytest.approx(everything - math.log(500 / 95), abs=0.2)


def test_a_batch_that_is_the_gallery_has_the_batch_loss() -> None:
    """The two kinds of negatives would not be two sizes of one thing."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(9, 4, generator=generator) for _ in range(2))
    ids, scale = torch.arange(9), torch.tensor(1.5)
    partners = [(row,) for row in range(9)]
    plain = SoftmaxLoss(scale)(images, texts, ids, ids)
    for of, features in (("images", images), ("texts", texts)):
        gallery = Gallery(of, F.normalize(features, dim=-1), partners)
        torch.testing.assert_close(SoftmaxLoss(scale, gallery)(images, texts, ids, ids), plain)


def test_the_fixed_side_is_contrasted_with_the_batch() -> None:
    """An image would have no captions to be told from."""
    images, texts = torch.randn(4, 3), torch.randn(4, 3)
    ids, scale = torch.arange(4), torch.tensor(1.0)
    features = F.normalize(torch.randn(20, 3), dim=-1)
    gallery = Gallery("images", features, [(row,) for row in range(4)])
    to_text, _ = one_way_losses(images, texts, scale, ids, ids)
    wanted = (to_text + F.cross_entropy(*gallery.logits(texts, ids, ids, scale))) / 2
    torch.testing.assert_close(SoftmaxLoss(scale, gallery)(images, texts, ids, ids), wanted)


OPTIONS: dict[str, Any] = {"batch_size": 6, "epochs": 1, "workers": 0, "progress": False, "lr": 1e-3}


def first_loss(run: Path) -> float:
    return float(json.loads((run / "events.jsonl").read_text().splitlines()[0])["loss"])


@pytest.mark.parametrize("targets", ["text-attention", "vision-attention"])
def test_the_gallery_is_the_default_where_a_tower_is_frozen(
    targets: str, clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """The better negatives would have to be asked for, or the loss would not have them."""
    losses = {}
    cg.apply_lora(clip, r=2, targets=targets)
    for negatives in (None, "gallery", "batch"):
        cg.fit(clip, pairs, **groups(out=tmp_path / str(negatives), negatives=negatives, **OPTIONS))
        losses[negatives] = first_loss(tmp_path / str(negatives))
        cg.remove_lora(clip)
        cg.apply_lora(clip, r=2, targets=targets)
    assert losses[None] == pytest.approx(losses["gallery"], rel=1e-5)
    assert losses["batch"] < losses[None] - 0.1


def test_a_gallery_needs_a_frozen_tower(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--negatives gallery` would be accepted and ignored where both towers train."""
    cg.apply_lora(clip, r=2, targets="attention")
    with pytest.raises(cg.errors.ConfigError, match="`negatives=gallery` needs a frozen tower"):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", negatives="gallery", **OPTIONS))
    cg.fit(clip, pairs, **groups(out=tmp_path / "default", **OPTIONS))
