"""Learn to match images and captions: the contrastive loss of CLIP, over the batch or over a gallery.

Where one tower is frozen its features are known before training begins. A caption can then be told from every
training image at each step, not from those few that share its batch, for one more matrix product.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.models.clip import Clip
from clipgraft.train.feed import FeatureSource, Feed, FixedImages, FixedTexts, MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.recipe import Objective, Recipe

log = logging.getLogger("clipgraft")
_FEW_CAPTIONS = 20
"""Pairs that share a caption on average, from which on captions look like classes."""


class ContrastiveRecipe(Recipe):
    """Each image is told from all other captions, and each caption from all other images."""

    def check(self) -> None:
        require_contrast(self.pairs)

    def settings(self) -> dict[str, Any]:
        """The training data by names and captions."""
        digest = hashlib.sha256()
        for image, caption in self.pairs.rows():
            told = f"{image}\t{self.pairs.images[image].name}\t{caption}\n"
            digest.update(told.encode(errors="surrogatepass"))
        return {"data": digest.hexdigest()[:16]}

    def objective(self, inputs: Inputs) -> Objective:
        if isinstance(inputs.images, FixedImages):
            require_different(inputs.images.features)
        return contrastive(inputs)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val is not None
        val = self.val
        images = inputs.val_features(val.images)
        texts = inputs.encode_captions([caption for group in val.captions for caption in group])
        # Several processes encode a share each, and rank 0 counts.
        return inputs.setup.world.on_rank0(lambda: measure_retrieval(inputs.encoder, val, images, texts))


def contrastive(inputs: Inputs) -> Contrastive:
    """The contrastive objective, over the gallery of a frozen tower where there is one."""
    gallery = choose_gallery(inputs.feed, inputs.images, inputs.texts, inputs.setup.train.negatives)
    return Contrastive(inputs.setup.clip, inputs.images, inputs.texts, gallery)


def require_contrast(train: Pairs) -> None:
    """Refuse pairs among which no image or no caption can be told from another.

    Equal captions are no negatives of one another, nor are captions of one image: the loss is 0.0 at every
    step.

    Raises:
        DataError: saying what there is only one of.
    """
    rows = train.rows()
    captions = {caption for _, caption in rows}
    images = {train.images[image] for image, _ in rows}
    if len(captions) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are the same, {next(iter(captions))[:60]!r}, and "
            "equal captions are no negatives of one another; check the caption column (`csv_caption_key`), "
            "or give captions that differ"
        )
    if len(images) == 1:
        raise DataError(
            f"nothing to learn: all {len(rows):,} captions are of one image, {next(iter(images)).name}, and "
            "no other is there to tell it from; check the image column (`csv_img_key`), or give more images"
        )
    if len(rows) >= _FEW_CAPTIONS * len(captions):
        log.warning(
            "%d pairs have only %d different captions, and equal ones are no negatives of one another: if "
            "they are classes, `fit_classifier` learns more from them",
            len(rows),
            len(captions),
        )


def require_different(features: Tensor) -> None:
    """Refuse images whose features, (N, D) unit-norm of a frozen tower, are all the same.

    Raises:
        DataError: they are.
    """
    if float((features - features[:1]).abs().max()) < 1e-6:
        raise DataError(
            f"nothing to learn: the frozen image tower gives the same features for all {len(features):,} "
            "images, as if they were copies of one; check the images, or train the image tower too "
            "(`targets=linear`)"
        )


@dataclass(frozen=True)
class Contrastive:
    """Images and captions that belong together, told from all others.

    Attributes:
        images, texts: what each tower gives for a micro-batch.
        gallery: what the trained tower is contrasted with besides the batch.
    """

    clip: Clip
    images: FeatureSource
    texts: FeatureSource
    gallery: Gallery | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return [self._encode(part) for part in batch]

    def _encode(self, part: MicroBatch) -> Encode:
        device = self.clip.device
        return lambda: (self.images(part).to(device), self.texts(part).to(device))

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        image_ids = torch.cat([part.image_ids for part in batch])
        caption_ids = torch.cat([part.caption_ids for part in batch])
        return lambda images, texts: pair_loss(
            images, texts, self.clip.logit_scale, image_ids, caption_ids, self.gallery
        )


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
    gallery: Gallery | None = None,
) -> Tensor:
    """Symmetric InfoNCE: the mean of both `one_way_losses`.

    If there is a gallery, the trained tower's direction runs over it.

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
