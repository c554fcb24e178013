"""Measure retrieval: encode both sides of pairs once, count ranks, and turn those into metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.evaluate.metrics import DEFAULT_KS, Metrics
from clipgraft.evaluate.ranks import BLOCK_BYTES, RetrievalRanks, retrieval_ranks
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.models.device import use_autocast
from clipgraft.progress import Progress


def evaluate_retrieval(
    model: ClipLike,
    pairs: Pairs,
    features: FeatureArgs | None = None,
    *,
    batch_size: int = 64,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    cache: FeatureCache | None = None,
    progress: Progress = None,
    **options: Any,
) -> Metrics:
    """Measure recall and rank in both directions over all images and captions of `pairs`.

    Args:
        model: a `Clip` or a raw model.
        pairs: images with one or many captions each.
        features: how images become features, and where those are kept, unless LoRA acts on the image tower.
        batch_size: images encoded at once.
        image_features: (N, D) features of `pairs.images`, where they are known already.
        text_features: (M, D) features of all captions, in the order of the images.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).
        cache: an open feature cache, in place of the one that `features` names.
        **options: single fields of `FeatureArgs`, such as `workers=0`, in place of those of `features`.

    Returns:
        Metrics under the names of `clipgraft.evaluate.metrics`: a dict that prints readably.
    """
    clip = as_clip(model)
    features = (features or FeatureArgs()).replace(**options)
    encoder = Encoder(clip, use_autocast(features.autocast, clip.device))
    if image_features is None:
        image_features = encode_images(
            clip,
            pairs.images,
            features,
            batch_size=batch_size,
            encoder=encoder,
            cache=cache,
            progress=progress,
        )
    return Metrics(measure_retrieval(encoder, pairs, image_features, text_features).metrics)


def measure_retrieval(
    encoder: Encoder, pairs: Pairs, image_features: Tensor, text_features: Tensor | None = None
) -> Measured:
    """Compute the metrics of `evaluate_retrieval`, and the outcome of every query, from image features."""
    owner = torch.tensor([index for index, group in enumerate(pairs.captions) for _ in group])
    if text_features is None:
        captions = [caption for group in pairs.captions for caption in group]
        text_features = encode_captions(encoder.clip, captions, encoder=encoder)
    ranks = retrieval_ranks(image_features, text_features, owner)
    return Measured(metrics_of(ranks), first_hits(ranks, owner))


def first_hits(ranks: RetrievalRanks, image_of_text: Tensor) -> Outcomes:
    """Find the queries of both directions whose right answer is first; images without captions are none.

    In random order, c captions of an image hold the first of M places with probability c/M, which is on
    average one over the number of images with captions; a caption's image is the first of N by 1/N.
    """
    asked = (ranks.image_to_text > 0).nonzero()[:, 0].cpu()
    found = {
        "image_to_text_R@1": ranks.image_to_text.cpu()[asked] == 1,
        "text_to_image_R@1": ranks.text_to_image.cpu() == 1,
    }
    groups = {"image_to_text_R@1": asked.numpy(), "text_to_image_R@1": image_of_text.cpu().numpy()}
    chance = {
        "image_to_text_R@1": 1 / len(asked),
        "text_to_image_R@1": 1 / len(ranks.image_to_text),
    }
    return Outcomes({name: hits.numpy() for name, hits in found.items()}, groups, chance)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    block_bytes: int = BLOCK_BYTES,
) -> Metrics:
    """Compute recall@k, mean and median rank in both directions.

    Args:
        image_features: floating (N, D); scores are dot products: pass unit-norm rows for cosine similarity.
        text_features: floating (M, D).
        image_of_text: integer (M,), each caption's image. An image without captions is no query (nothing
            could be right) but stays in the gallery as a distractor.
        ks: cut-offs; one beyond the size of the gallery gives 1.0.
        block_bytes: memory for one block of scores; does not change the result.

    Returns:
        Shares in [0, 1] and ranks from 1, under the names of the module's table.

    Raises:
        DataError: features, captions and image numbers do not fit together.
        TrainingError: a feature is NaN or infinite.
        ConfigError: a k below 1, or a block that cannot hold one score.
    """
    too_small = [k for k in ks if k < 1]
    if too_small:
        raise ConfigError(f"recall@{too_small[0]} does not exist: every k must be at least 1.")
    ranks = retrieval_ranks(image_features, text_features, image_of_text, block_bytes=block_bytes)
    return Metrics(metrics_of(ranks, ks))


def metrics_of(ranks: RetrievalRanks, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Compute the numbers of `retrieval_metrics` from ranks."""
    asked = ranks.image_to_text[ranks.image_to_text > 0]
    image_to_text = rank_metrics(asked, ks)
    text_to_image = rank_metrics(ranks.text_to_image, ks)
    return {
        **{f"image_to_text_{name}": value for name, value in image_to_text.items()},
        **{f"text_to_image_{name}": value for name, value in text_to_image.items()},
        **{f"image_retrieval_recall@{k}": text_to_image[f"R@{k}"] for k in ks},
        **{f"text_retrieval_recall@{k}": image_to_text[f"R@{k}"] for k in ks},
    }


def rank_metrics(ranks: Tensor, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Compute `mean_rank`, `median_rank` and `R@k` of 1-based ranks, int64 (n,).

    Raises:
        DataError: there are no ranks.
    """
    if not len(ranks):
        raise DataError("no query to average over: pass at least one rank.")
    ordered = ranks.sort().values
    low, high = ordered[(len(ranks) - 1) // 2], ordered[len(ranks) // 2]
    return {
        "mean_rank": int(ranks.sum()) / len(ranks),
        "median_rank": float((low + high) // 2),
        **{f"R@{k}": int((ranks <= k).sum()) / len(ranks) for k in ks},
    }
