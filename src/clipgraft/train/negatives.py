"""All of a fixed tower's features as negatives, instead of those of the batch alone.

Where one tower is frozen its features are known before training begins. A caption can then be told from every
training image at each step, not from those few that share its batch, for one more matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.errors import ConfigError
from clipgraft.train.feature_sources import FeatureSource, FixedImages, FixedTexts
from clipgraft.train.feed import Feed

MOST_NEGATIVES = 65_536
"""Of a larger gallery, a random part is drawn at every step."""


@dataclass(frozen=True)
class Gallery:
    """What queries of the trained tower are told from.

    Attributes:
        of: which tower is the fixed one; the other's features are the queries.
        features: (G, D) unit-norm, of the fixed tower.
        partners: for every query id, the rows of `features` that belong to it and are no negatives.
        most: how many rows a step uses at most, besides those of its own batch.
    """

    of: Literal["images", "texts"]
    features: Tensor
    partners: Sequence[tuple[int, ...]]
    most: int = MOST_NEGATIVES

    def loss(self, queries: Tensor, query_ids: Tensor, own: Tensor, logit_scale: Tensor) -> Tensor:
        """Mean cross-entropy of each query's own row against all of the gallery.

        Args:
            queries: (N, D), any norm.
            query_ids: (N,) on the CPU, into `partners`.
            own: (N,) on the CPU, the row that each query is paired with.
            logit_scale: scalar log inverse temperature.

        Returns:
            Scalar of at least fp32.
        """
        rows = self._drawn(own)
        place = {row: number for number, row in enumerate(rows.tolist())} if rows is not None else None
        hidden = self._hidden(query_ids.tolist(), own.tolist(), place)
        device = queries.device
        gallery = self.features if rows is None else self.features[rows.to(self.features.device)]
        labels = own if place is None else torch.tensor([place[row] for row in own.tolist()])
        wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
        logits = logit_scale.to(wide.dtype).exp() * F.normalize(wide, dim=-1) @ gallery.to(wide).T
        if len(hidden):
            at = torch.tensor(hidden, device=device).T
            logits = logits.index_put((at[0], at[1]), logits.new_tensor(float("-inf")))
        return F.cross_entropy(logits, labels.to(device))

    def _drawn(self, own: Tensor) -> Tensor | None:
        """The rows of this step, in order; None for all."""
        count = len(self.features)
        if count <= self.most:
            return None
        drawn: Tensor = torch.unique(torch.cat([own, torch.randint(count, (self.most,))]))
        return drawn

    def _hidden(
        self, query_ids: Iterable[int], own: Iterable[int], place: dict[int, int] | None
    ) -> list[tuple[int, int]]:
        """(query, column) of every other row that belongs to a query too."""
        others = (
            (number, row)
            for number, (query, label) in enumerate(zip(query_ids, own, strict=True))
            for row in self.partners[query]
            if row != label
        )
        if place is None:
            return list(others)
        return [(number, place[row]) for number, row in others if row in place]


def partners_of(query_ids: Iterable[int], rows: Iterable[int], queries: int) -> list[tuple[int, ...]]:
    """From pairs of a query and its gallery row, the distinct rows of every query 0 … queries - 1."""
    found: list[dict[int, None]] = [{} for _ in range(queries)]
    for query, row in zip(query_ids, rows, strict=True):
        found[query][row] = None
    return [tuple(rows_of) for rows_of in found]


def pair_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
    gallery: Gallery | None,
) -> Tensor:
    """`contrastive_loss`, in which the trained tower's direction runs over the gallery if there is one.

    Ids are on the CPU, (N,); features are (N, D) of any norm. The result is a scalar.
    """
    device = image_features.device
    to_text, to_image = one_way_losses(
        image_features, text_features, logit_scale, image_ids.to(device), caption_ids.to(device)
    )
    if gallery is not None and gallery.of == "images":
        to_image = gallery.loss(text_features, caption_ids, image_ids, logit_scale)
    elif gallery is not None:
        to_text = gallery.loss(image_features, image_ids, caption_ids, logit_scale)
    return (to_text + to_image) / 2


def choose_gallery(
    feed: Feed, images: FeatureSource, texts: FeatureSource, negatives: str | None
) -> Gallery | None:
    """The gallery of a run: None for `batch`; where `negatives` is None, one if a tower's features are fixed.

    Raises:
        ConfigError: `gallery` is asked for, and neither tower's features are known before training.
    """
    if negatives == "batch":
        return None
    if isinstance(images, FixedImages):
        partners = partners_of(feed.caption_of_row.tolist(), feed.image_of_row.tolist(), len(feed.captions))
        return Gallery("images", F.normalize(images.features.float(), dim=-1), partners)
    if isinstance(texts, FixedTexts):
        queries = int(feed.image_of_row.max()) + 1
        partners = partners_of(feed.image_of_row.tolist(), feed.caption_of_row.tolist(), queries)
        return Gallery("texts", F.normalize(texts.features.float(), dim=-1), partners)
    if negatives == "gallery":
        raise ConfigError(
            "`negatives=gallery` needs a frozen tower whose features are known beforehand (no `augment`): "
            "adapt one tower only, or use `negatives=batch`"
        )
    return None


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
) -> Tensor:
    """Symmetric InfoNCE over a batch of pairs: the mean of both `one_way_losses`."""
    to_text, to_image = one_way_losses(image_features, text_features, logit_scale, image_ids, caption_ids)
    return (to_text + to_image) / 2


def one_way_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """InfoNCE over a batch of pairs: of each image among the captions, and of each caption among the images.

    Two pairs of the same image, or with the same caption, are no negatives of each other: their logits are
    left out of the softmax, so that a batch with several captions of one image is not told to push them
    apart.

    Args:
        image_features: (N, D), any norm.
        text_features: (N, D), any norm.
        logit_scale: scalar log inverse temperature.
        image_ids: (N,) equal for the same image.
        caption_ids: (N,) equal for the same caption text.

    Returns:
        Two scalars of at least fp32: image to text, text to image.
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    logits = logit_scale.float().exp() * images @ texts.T
    logits = logits.masked_fill(false_negatives(image_ids, caption_ids), float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)


def false_negatives(image_ids: Tensor, caption_ids: Tensor) -> Tensor:
    """(N, N) True where two different pairs share the image or the caption."""
    same = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    return same.fill_diagonal_(False)
