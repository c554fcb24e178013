"""Stock open_clip: full fine-tuning with its own loss, and its own retrieval metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.batches import loader
from benchmarks.contestants.loop import adamw, timed_steps
from benchmarks.data import read_table
from benchmarks.prepare import OPENCLIP_BASE


def train_full(
    table: str, *, batch_size: int, warmup: int, steps: int, autocast: bool = False, workers: int = 2
) -> dict[str, Any]:
    """Train every weight of both towers as `open_clip_train.main` does; `autocast` is its amp_bf16."""
    import open_clip
    from open_clip.loss import ClipLoss

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(OPENCLIP_BASE))
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        images, captions = zip(*samples, strict=True)
        return torch.stack(images), tokenize(list(captions))

    clip_loss = ClipLoss()

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        loss: Tensor = clip_loss(*model(*batch))
        return loss

    model.train()
    return timed_steps(
        loader(read_table(Path(table)), preprocess, collate, batch_size=batch_size, workers=workers),
        loss_of,
        adamw(model),
        warmup=warmup,
        steps=steps,
        autocast=autocast,
    )
