"""Retrieval on pairs: encode both sides once, then count ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.evaluate.metrics import metrics_of
from clipgraft.evaluate.ranks import RetrievalRanks, retrieval_ranks
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.models.device import use_autocast
from clipgraft.progress import Progress


def evaluate_retrieval(
    model: ClipLike,
    pairs: Pairs,
    *,
    batch_size: int = 64,
    workers: int = 2,
    autocast: bool | None = False,
    encoder: Encoder | None = None,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    progress: Progress = None,
    cache: FeatureCache | None = None,
    exact_preprocess: bool = False,
) -> dict[str, float]:
    """Recall and rank both ways over all images and captions of `pairs`.

    Args:
        model: a `Clip` or a raw model.
        pairs: images with one or many captions each.
        batch_size: images encoded at once.
        workers: processes that decode images.
        autocast: compute features in bf16 where it is safe; None where the device is also fast at it.
        encoder: takes the place of a new one with `autocast`.
        image_features: (N, D) features of `pairs.images`, where they are known already.
        text_features: (M, D) features of all captions, in the order of the images.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).
        cache: where features of the images are looked up and kept, unless LoRA acts on the image tower.
        exact_preprocess: preprocess images with the model's own transform, to the last grey level.

    Returns:
        Metrics under the names of `clipgraft.evaluate.metrics`.
    """
    clip = as_clip(model)
    encoder = encoder or Encoder(clip, use_autocast(autocast, clip.device))
    if image_features is None:
        image_features = encode_images(
            clip,
            pairs.images,
            batch_size=batch_size,
            workers=workers,
            encoder=encoder,
            progress=progress,
            cache=cache,
            exact_preprocess=exact_preprocess,
        )
    return measure_retrieval(encoder, pairs, image_features, text_features).metrics


def measure_retrieval(
    encoder: Encoder, pairs: Pairs, image_features: Tensor, text_features: Tensor | None = None
) -> Measured:
    """The metrics of `evaluate_retrieval` with what every query got, from features of the images."""
    owner = torch.tensor([index for index, group in enumerate(pairs.captions) for _ in group])
    if text_features is None:
        captions = [caption for group in pairs.captions for caption in group]
        text_features = encode_captions(encoder.clip, captions, encoder=encoder)
    ranks = retrieval_ranks(image_features, text_features, owner)
    return Measured(metrics_of(ranks), first_hits(ranks, owner))


def first_hits(ranks: RetrievalRanks, image_of_text: Tensor) -> Outcomes:
    """Which queries of both directions have their right answer first; images without captions are none.

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
