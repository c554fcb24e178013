"""Telling classes apart: prototypes out of prompts, the loss over them, and heads without prompts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["linear", "cosine"]


def class_prototypes(prompts: Tensor, class_of_prompt: Tensor) -> Tensor:
    """(P, D) features of prompts, any norm, and the (P,) class of each -> (C, D) unit-norm class features.

    A class is the mean of its prompts' unit-norm features, normalised again (Radford et al. 2021,
    arXiv:2103.00020, section 3.1.4). Every class 0 … C - 1 has a prompt.
    """
    unit = F.normalize(prompts.float(), dim=-1)
    classes = int(class_of_prompt.max()) + 1
    sums = unit.new_zeros(classes, unit.shape[1]).index_add(0, class_of_prompt, unit)
    return F.normalize(sums, dim=-1)


def class_loss(
    images: Tensor, prototypes: Tensor, scale: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of (N, D) image features, any norm, over (C, D) unit-norm class features.

    Args:
        images: the features.
        prototypes: of the classes.
        scale: scalar inverse temperature.
        labels: (N,) class of every image, on any device.
        weights: (C,) of the classes, or None for 1 each.

    Returns:
        Scalar, fp32.
    """
    logits = scale * F.normalize(images.float(), dim=-1) @ prototypes.T
    weight = None if weights is None else weights.to(logits)
    return F.cross_entropy(logits, labels.to(logits.device), weight=weight)


class Head(nn.Module):
    """A classifier on image features that starts as the classes' prompts say.

    `linear` gives x·Wᵀ + b on unit-norm x; `cosine` keeps the rows of W at unit norm and has no bias. Both
    multiply by the inverse temperature that the model had when the head was made, so that a new head predicts
    what zero-shot classification does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: Tensor

    def __init__(self, kind: HeadKind, prototypes: Tensor, scale: float) -> None:
        """`prototypes`: (C, D) unit-norm class features."""
        super().__init__()
        self.kind: HeadKind = kind
        self.weight = nn.Parameter(prototypes.detach().clone().float())
        self.bias = nn.Parameter(torch.zeros(len(prototypes))) if kind == "linear" else None
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, images: Tensor) -> Tensor:
        """(N, D) image features, any norm -> (N, C) logits, fp32."""
        weight = self.weight if self.kind == "linear" else F.normalize(self.weight, dim=-1)
        logits = F.linear(F.normalize(images.float(), dim=-1), weight) * self.scale
        return logits if self.bias is None else logits + self.bias
