"""Learn a language from translations: give for a text what the base gives for the text it translates.

The base is its own teacher, as in multilingual distillation (Reimers & Gurevych 2020, arXiv:2004.09813; for
CLIP's text tower Carlsson et al. 2022, Multilingual-CLIP): no picture is needed. The loss is the cosine
distance that `retain` holds a model to its base with. A source text is among its own translations, so that
the language of the base is kept. Pairs of pictures and captions may be mixed in, in any number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.retained import Retained
from clipgraft.data.translations import Translations
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.evaluate.bootstrap import Measured, Outcomes
from clipgraft.evaluate.metrics import BETWEEN_TEXTS, DIRECTIONS
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.models.sites import TOWERS
from clipgraft.train.args import TranslateArgs
from clipgraft.train.feed import Feed, FixedImages, LiveTexts, MicroBatch, trains
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.contrastive import Contrastive, digest_of, require_contrast
from clipgraft.train.recipes.distillation import feature_distance
from clipgraft.train.recipes.gallery import Gallery, partners_of
from clipgraft.train.recipes.pair_losses import choose_loss, make_pair_loss
from clipgraft.train.recipes.recipe import Objective, Recipe
from clipgraft.train.retention import features_by_base
from clipgraft.train.setup import Setup

log = logging.getLogger("clipgraft")
_NOTHING = Pairs((), ())
_Value = TypeVar("_Value")


class TranslationRecipe(Recipe):
    """Translations, and pairs if there are any, for a text tower; the image tower stays as it is.

    In batches a source text stands where an image does: after the pictures, with its features by the base.

    Attributes:
        pictures: pairs that are mixed in; none of them for translations alone.
        held_out: translations to measure on; None for none.
    """

    unit = "translations"

    def __init__(
        self,
        translations: Translations,
        held_out: Translations | None = None,
        pictures: Pairs | None = None,
        val: Pairs | None = None,
        options: TranslateArgs | None = None,
        retained: Retained | None = None,
    ) -> None:
        self.pictures, self.held_out = pictures or _NOTHING, held_out
        self.options = options or TranslateArgs()
        self._sources = translations.sources
        texts = translations.as_pairs(with_source=True)
        pairs = Pairs(self.pictures.images + texts.images, self.pictures.captions + texts.captions)
        self._has_val_pictures = val is not None
        if val is None and held_out is not None:
            val = held_out.as_pairs()
        super().__init__(pairs, val, retained)
        if not self.pictures and not self._has_val_pictures:
            self.towers = ("text",)

    def check(self) -> None:
        if self.pictures:
            require_contrast(self.pictures)

    def check_model(self, clip: Clip) -> None:
        if not trains(clip, "text"):
            raise ConfigError(
                "translations train the text tower, but it is frozen: adapt its sites "
                "(`targets=text-matrices`), or drop `lock_text`"
            )
        if set(clip.towers) == set(TOWERS) and trains(clip, "vision"):
            raise ConfigError(
                "translations train the text tower alone, but the image tower is to train: adapt text sites "
                "(`targets=text-matrices`), or add `lock_image`"
            )

    def settings(self) -> dict[str, Any]:
        """All texts, by names the pictures, and the weight."""
        return {"data": digest_of(self.pairs), **self.options.model_dump()}

    def prepare(self, setup: Setup, encoder: Encoder) -> Inputs:
        train, world = setup.train, setup.world
        if train.augment or train.cache_views is not None:
            raise ConfigError(
                "pictures beside translations are encoded once, and whole: drop `augment` and `cache_views`"
            )
        feed = Feed(
            self.pairs, train.batch_size, train.accum_freq, train.seed, None, setup.features.workers, world
        )
        empty = FixedImages(torch.empty(0))
        inputs = Inputs(setup, encoder, feed, empty, LiveTexts(encoder, feed.captions))
        log.info("the base encodes each source text once: what its translations are to give")
        fixed = features_by_base(inputs, self._sources)
        if self.pictures:
            log.info("the image tower is frozen: each image is encoded once")
            fixed = torch.cat([inputs.encode_images(self.pictures.images, encoder), fixed])
        inputs = replace(inputs, images=FixedImages(fixed))
        self._taught = None if self.held_out is None else features_by_base(inputs, self.held_out.sources)
        val = self._taught
        if self._has_val_pictures and self.val is not None:
            val = inputs.encode_images(self.val.images, encoder)
        return inputs if val is None else replace(inputs, val_images=lambda: val)

    def objective(self, inputs: Inputs) -> Objective:
        assert isinstance(inputs.images, FixedImages)
        setup, clip, count = inputs.setup, inputs.setup.clip, len(self.pictures)
        gallery = None
        if count and setup.train.negatives != "batch":
            of_pictures = inputs.feed.image_of_row < count
            rows = inputs.feed.caption_of_row[of_pictures], inputs.feed.image_of_row[of_pictures]
            partners = partners_of(rows[0].tolist(), rows[1].tolist(), len(inputs.feed.captions))
            features = F.normalize(inputs.images.features[:count].float(), dim=-1)
            gallery = Gallery("images", features, partners).on(clip.device)
        pair_loss = make_pair_loss(clip, choose_loss(clip, setup.train.loss), gallery)
        weight = self.options.translation_weight if count else 1.0
        return Translated(Contrastive(clip, inputs.images, inputs.texts, pair_loss), count, weight)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val is not None
        found: list[Measured] = []
        if self._has_val_pictures:
            found.append(_measure(inputs, self.val, inputs.val_features(self.val.images)))
        if self.held_out is not None and self._taught is not None:
            found.append(_measure_texts(inputs, self.held_out, self._taught))
        metrics = {name: value for measured in found for name, value in measured.metrics.items()}
        return Measured(metrics, found[0].outcomes)


def _measure(inputs: Inputs, pairs: Pairs, images: Tensor) -> Measured:
    texts = inputs.encode_captions([caption for group in pairs.captions for caption in group])
    return inputs.setup.world.on_rank0(lambda: measure_retrieval(inputs.encoder, pairs, images, texts))


def _measure_texts(inputs: Inputs, held_out: Translations, taught: Tensor) -> Measured:
    """Measure how well translations find their sources and are found, and how near they are to them."""
    pairs = held_out.as_pairs()
    found = _measure(inputs, pairs, taught)
    texts = inputs.encode_captions([text for group in pairs.captions for text in group])
    owner = torch.tensor([index for index, group in enumerate(pairs.captions) for _ in group])
    metrics = _renamed(found.metrics)
    metrics["teacher_cosine"] = float((texts * taught[owner]).sum(1).mean())
    outcomes = found.outcomes
    parts = _renamed(outcomes.hits), _renamed(outcomes.groups), _renamed(outcomes.chance)
    return Measured(metrics, Outcomes(*parts))


def _renamed(by_metric: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values under the metrics of translations: `image_to_text_R@1` -> `source_to_target_R@1`."""
    return {
        name.replace(direction, between_texts): value
        for name, value in by_metric.items()
        for direction, between_texts in zip(DIRECTIONS, BETWEEN_TEXTS, strict=True)
        if name.startswith(direction)
    }


@dataclass(frozen=True)
class Translated:
    """The distance of translations to the base's features of their sources, and the loss of pairs.

    Each row of a batch counts as much as any other, but for `weight`: the two losses are means over their
    rows, and come in the share that these have of the batch.

    Attributes:
        pairs: gives the parts of a batch, and the loss of those rows that are pairs.
        pictures: how many images there are; ids from there on are source texts.
        weight: of a translation beside a pair.
    """

    pairs: Contrastive
    pictures: int
    weight: float

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return self.pairs.parts(batch)

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        image_ids = torch.cat([part.image_ids for part in batch])
        caption_ids = torch.cat([part.caption_ids for part in batch])
        of_pictures = image_ids < self.pictures
        share = float(of_pictures.float().mean())
        of_pairs, of_texts = of_pictures.nonzero()[:, 0], (~of_pictures).nonzero()[:, 0]

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            total = texts.new_zeros((), dtype=torch.promote_types(texts.dtype, torch.float32))
            if len(of_texts):
                rows = queued(of_texts, texts.device)
                total = total + (1 - share) * self.weight * feature_distance(texts[rows], images[rows])
            if len(of_pairs):
                rows = queued(of_pairs, texts.device)
                ids = image_ids[of_pairs], caption_ids[of_pairs]
                total = total + share * self.pairs.pair_loss(images[rows], texts[rows], *ids)
            return total

        return loss
