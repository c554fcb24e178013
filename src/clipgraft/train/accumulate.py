"""Exact gradients of a contrastive loss over more pairs than fit in memory at once.

Averaging the losses of micro-batches is not the loss of the whole batch: negatives would be missing. Instead
features are computed once without a graph, the loss of the whole batch gives their gradients, and each
micro-batch is run again, with the random state replayed, to carry its features' gradients on to the weights
(GradCache: Gao et al. 2021, arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Features: TypeAlias = tuple[Tensor, Tensor]
Encode: TypeAlias = Callable[[], Features]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def contrastive_backward(micro_batches: Sequence[Encode], loss_of: Loss) -> Tensor:
    """Backward pass of `loss_of` over the features of all micro-batches.

    Args:
        micro_batches: functions that give (image, text) features of a part of the batch, (n, D) each.
        loss_of: scalar loss of the (N, D) image and text features of the whole batch.

    Returns:
        The detached loss. Gradients are accumulated on the weights as by one `backward()`.
    """
    if len(micro_batches) == 1:
        loss = loss_of(*micro_batches[0]())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    states, features = _features_without_graph(micro_batches)
    after = _random_state()
    leaves = [tuple(part.detach().requires_grad_() for part in pair) for pair in features]
    loss = loss_of(torch.cat([images for images, _ in leaves]), torch.cat([texts for _, texts in leaves]))
    loss.backward()  # type: ignore[no-untyped-call]
    for encode, state, pair in zip(micro_batches, states, leaves, strict=True):
        _set_random_state(state)
        _carry_back(encode(), [leaf.grad for leaf in pair])
    _set_random_state(after)
    return loss.detach()


def _features_without_graph(micro_batches: Sequence[Encode]) -> tuple[list[list[Tensor]], list[Features]]:
    states, features = [], []
    with torch.no_grad():
        for encode in micro_batches:
            states.append(_random_state())
            features.append(encode())
    return states, features


def _carry_back(features: Features, gradients: Sequence[Tensor | None]) -> None:
    """Backward from features that have a graph; those of a frozen tower have none."""
    pairs = [(part, grad) for part, grad in zip(features, gradients, strict=True) if part.requires_grad]
    torch.autograd.backward([part for part, _ in pairs], [grad for _, grad in pairs])


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
