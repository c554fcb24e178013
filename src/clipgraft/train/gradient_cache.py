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

from clipgraft.models.device import accelerator_random, set_accelerator_random
from clipgraft.train.distributed import ALONE, World

Features: TypeAlias = tuple[Tensor, Tensor]
Encode: TypeAlias = Callable[[], Features]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def contrastive_backward(micro_batches: Sequence[Encode], loss_of: Loss, world: World = ALONE) -> Tensor:
    """Backward pass of `loss_of` over the features of all micro-batches.

    Args:
        micro_batches: functions that give (image, text) features of a part of the batch, (n, D) each; of
            several processes, those of this one.
        loss_of: scalar loss of the (N, D) image and text features of the whole batch, in the order of ranks
            and micro-batches; called at rank 0 alone.
        world: the processes that share the batch.

    Returns:
        The detached loss. Gradients are accumulated on the weights as by one `backward()`; of several
        processes each has a part of the sum (`World.sum_gradients`).
    """
    if len(micro_batches) == 1:
        features = micro_batches[0]()
        if world.alone:
            loss = loss_of(*features)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        loss, gradients = _loss_and_gradients([features], loss_of, world)
        _carry_back(features, gradients[0])
        return loss
    states, parts = _features_without_graph(micro_batches)
    loss, gradients = _loss_and_gradients(parts, loss_of, world)
    after = _random_state()
    for encode, state, wanted in zip(micro_batches, states, gradients, strict=True):
        _set_random_state(state)
        _carry_back(encode(), wanted)
    _set_random_state(after)
    return loss


def _loss_and_gradients(
    parts: Sequence[Features], loss_of: Loss, world: World
) -> tuple[Tensor, list[list[Tensor]]]:
    """The loss of the features of all processes, and for each part of this process its gradients."""
    own = [torch.cat(tower).detach() for tower in zip(*parts, strict=True)]
    leaves = [[rows.requires_grad_() for rows in given] for given in world.gather(*own)]
    loss = own[0].new_zeros(())
    if world.is_rank0:
        found = loss_of(*(torch.cat(tower) for tower in zip(*leaves, strict=True)))
        found.backward()  # type: ignore[no-untyped-call]
        # All processes must send the same types.
        loss = found.detach() if world.alone else loss.copy_(found.detach())
    gradients = [[torch.zeros_like(r) if r.grad is None else r.grad for r in given] for given in leaves]
    world.send([loss, *(gradient for given in gradients for gradient in given)])
    towers = [
        torch.split(gradient, [len(part[tower]) for part in parts])
        for tower, gradient in enumerate(gradients[world.rank])
    ]
    return loss, [list(part) for part in zip(*towers, strict=True)]


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
    return [torch.get_rng_state(), *accelerator_random()]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    set_accelerator_random(state[1:])
