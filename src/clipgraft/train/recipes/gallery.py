"""All features of a frozen tower, as what a batch of the other tower's features is compared with.

Where one tower is frozen its features are known before training begins. A caption can then be told from every
training image at each step, not from those few that share its batch, for one more matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.errors import ConfigError
from clipgraft.models.device import queued
from clipgraft.train.feed import FeatureSource, Feed, FixedImages, FixedTexts

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

    def on(self, device: torch.device) -> Gallery:
        """The same on a device, where each step needs all of it; a larger one stays where it is."""
        if len(self.features) > self.most:
            return self
        return replace(self, features=self.features.to(device))

    def logits(
        self, queries: Tensor, query_ids: Tensor, own: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled cosines of each query with all of the gallery, and where its own row is.

        Args:
            queries: (N, D), any norm.
            query_ids: (N,) on the CPU, into `partners`.
            own: (N,) on the CPU, the row that each query is paired with.
            logit_scale: scalar log inverse temperature.

        Returns:
            (N, rows) of at least fp32, -inf at the other rows that belong to the query; (N,) columns.
        """
        rows = self._drawn(own)
        place = {row: number for number, row in enumerate(rows.tolist())} if rows is not None else None
        hidden = self._hidden(query_ids.tolist(), own.tolist(), place)
        device = queries.device
        gallery = self.features if rows is None else self.features[queued(rows, self.features.device)]
        labels = own if place is None else torch.tensor([place[row] for row in own.tolist()])
        wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
        logits = (
            logit_scale.to(wide.dtype).exp() * F.normalize(wide, dim=-1) @ queued(gallery, device).to(wide).T
        )
        if len(hidden):
            at = queued(torch.tensor(hidden), device).T
            logits = logits.index_put((at[0], at[1]), logits.new_full((), float("-inf")))
        return logits, queued(labels, device)

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


def partners_of(query_ids: Iterable[int], rows: Iterable[int], queries: int) -> list[tuple[int, ...]]:
    """From pairs of a query and its gallery row, the distinct rows of every query 0 … queries - 1."""
    found: list[dict[int, None]] = [{} for _ in range(queries)]
    for query, row in zip(query_ids, rows, strict=True):
        found[query][row] = None
    return [tuple(rows_of) for rows_of in found]
