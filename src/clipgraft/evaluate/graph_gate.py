"""Measure what approximate ONNX graphs lose on the user's own pairs, and refuse what loses too much."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ModelError
from clipgraft.evaluate.recall_loss import BothSides, recall_lost
from clipgraft.models.clip import Clip
from clipgraft.models.forms.onnx_int8 import graph_paths
from clipgraft.models.onnx import onnx_runner
from clipgraft.models.sites import TOWERS

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class GraphGate:
    """Judges the graphs of a model, as `write_model(..., gate=GraphGate(clip, pairs))` asks it to.

    Attributes:
        clip: the model that the graphs stand for.
        pairs: images and captions on which recall is measured.
        max_recall_loss: percentage points of recall@1, 5 or 10 that may be lost at most.
        table: where the pairs are from, for the record.
        workers: processes that decode images; 0: a thread.
    """

    clip: Clip
    pairs: Pairs
    max_recall_loss: float = 1.0
    table: str = ""
    workers: int = 2

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        """Recall of the model and of the graphs in a folder, for the record beside them.

        Raises:
            ConfigError: more recall is lost than is allowed.
            DataError: the pairs cannot be used.
            ModelError: a tower is missing, without which there is no recall.
        """
        exact = self._features(Encoder(self.clip, pack=False))
        loss = recall_lost(exact, self._features(_GraphEncoder(self.clip, folder)), self.pairs)
        loss.require_at_most(self.max_recall_loss, "int8")
        log.info("int8 loses %.2f points of recall at most: %s", loss.points, loss)
        return {
            "table": self.table,
            "captions": loss.captions,
            "points_lost": loss.points,
            "max_recall_loss": self.max_recall_loss,
            "fp32": dict(loss.reference),
            "int8": dict(loss.approximate),
        }

    def _features(self, encoder: Encoder) -> BothSides:
        captions = [caption for group in self.pairs.captions for caption in group]
        images = encode_images(
            self.clip, self.pairs.images, encoder=encoder, label="gate", workers=self.workers
        )
        return images, encode_captions(self.clip, captions, encoder=encoder)


class _GraphEncoder(Encoder):
    """Encodes what a model does by the graphs written of it."""

    def __init__(self, clip: Clip, folder: Path) -> None:
        super().__init__(clip, pack=False)
        paths = graph_paths(folder)
        if missing := [tower for tower in TOWERS if tower not in paths]:
            raise ModelError(f"there is no recall to measure without a {missing[0]} tower: leave int8 out")
        self._text_run, self._vision_run = (onnx_runner(paths[tower]) for tower in ("text", "vision"))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, D) features."""
        return torch.from_numpy(self._text_run({"input_ids": tokens.cpu().numpy()}))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, D) features."""
        return torch.from_numpy(self._vision_run({"pixel_values": pixels.cpu().float().numpy()}))
