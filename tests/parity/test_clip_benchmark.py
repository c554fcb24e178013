from __future__ import annotations

import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from torch import Tensor

from clipgraft.evaluate.retrieval import retrieval_metrics


def features(captions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """50 images with `captions` noisy captions each, in shuffled order; unit rows, no ties."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.arange(50).repeat(captions)[torch.randperm(50 * captions, generator=g)]
    images = torch.nn.functional.normalize(torch.randn(50, 24, generator=g), dim=1)
    texts = images[owner] + 0.8 * torch.randn(len(owner), 24, generator=g)
    return images, torch.nn.functional.normalize(texts, dim=1), owner


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_clip_benchmarks(captions: int, k: int) -> None:
    """The numbers under CLIP_benchmark's names are not the ones in its published tables."""
    images, texts, owner = features(captions, seed=k)
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), owner] = True
    ours = retrieval_metrics(images, texts, owner, ks=(k,), block_bytes=3000)

    for name, matrix, truth in (
        ("image_retrieval", scores, positive),
        ("text_retrieval", scores.T, positive.T),
    ):
        theirs = (batchify(recall_at_k, matrix, truth, 16, "cpu", k=k) > 0).float().mean().item()
        assert 0 < theirs < 1
        assert ours[f"{name}_recall@{k}"] == pytest.approx(theirs, abs=1e-6)


def test_metrics_are_open_clip_trains() -> None:
    """The numbers under open_clip's names are not the ones its training log prints."""
    from open_clip_train.train import get_clip_metrics

    images, texts, owner = features(captions=1, seed=0)
    order = owner.argsort()
    theirs = get_clip_metrics(images, texts[order], torch.tensor(100.0))
    ours = retrieval_metrics(images, texts[order], torch.arange(50))
    assert theirs == pytest.approx({name: ours[name] for name in theirs})
