"""Gradient steps on features: which images each step sees, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

Loss = Callable[[Tensor, Tensor], Tensor]
"""Features (n, D) and labels (n,) -> a scalar."""


def take_steps(
    optimizer: Optimizer,
    loss: Loss,
    views: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    batch_size: int | None = None,
) -> None:
    """Minimise a loss with a learning rate that falls to zero along a cosine.

    Epoch e sees view e mod V of every image once.

    Args:
        optimizer: of what trains.
        loss: of a batch.
        views: (V, N, D).
        labels: (N,).
        epochs: passes over the images.
        seed: of the order.
        batch_size: images a step; None for all of them, in their own order.
    """
    size = batch_size or len(labels)
    total = epochs * -(-len(labels) // size)
    schedule = CosineAnnealingLR(optimizer, max(total, 1))
    for features, wanted in _batches(views, labels, epochs, seed, size):
        optimizer.zero_grad()
        loss(features, wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _batches(
    views: Tensor, labels: Tensor, epochs: int, seed: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        view = views[epoch % len(views)]
        if size >= len(labels):
            yield view, labels
            continue
        for ids in torch.split(torch.randperm(len(labels), generator=generator), size):
            yield view[ids], labels[ids]
