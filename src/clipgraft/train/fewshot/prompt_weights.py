"""Learn how much each prompt of an ensemble counts, from labelled training features.

A class is normalise(Σ_t w_t · text_t(class)), w a softmax. Nothing of the model changes, and what is learnt
is a file of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_captions
from clipgraft.data.prompts import WeightedPrompts
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError
from clipgraft.evaluate.classification import (
    ClassificationResult,
    classification_metrics,
    pool_prompts,
    prompt_logits,
)

_ITERATIONS = 100
_DIGITS = 4


@dataclass(frozen=True, eq=False)
class PromptEnsemble:
    """Prompts with learnt weights, and both ensembles on the data that they were learnt from.

    Attributes:
        prompts: of each class, in the order of the classes; weights of a class are 1 on average.
        uniform: how well the plain mean does on the training data.
        learnt: how well the weighted mean does there.
    """

    prompts: tuple[WeightedPrompts, ...]
    uniform: ClassificationResult
    learnt: ClassificationResult


def learn_prompt_weights(
    encoder: Encoder,
    data: Labelled,
    prompts: Sequence[Sequence[str]],
    image_features: Tensor,
    *,
    shared: bool,
) -> PromptEnsemble:
    """Minimise the cross-entropy of training images over the weights of the prompts.

    Args:
        encoder: of the model that the weights are for.
        data: the training images and labels.
        prompts: of each of `data.classes`.
        image_features: unit-norm (N, D) features of `data.images`.
        shared: one weight for each template, the same for all classes, which then have equally many prompts;
            else one for each prompt of each class.

    Raises:
        DataError: no class has two prompts, or classes differ in number where weights are shared.
    """
    counts = [len(group) for group in prompts]
    if max(counts) < 2:
        raise DataError(
            "every class has one prompt: there is nothing to weigh; give several templates, such as "
            "`templates=ensemble`, or several prompts of each class"
        )
    if shared and len(set(counts)) > 1:
        raise DataError(
            "classes differ in the number of prompts: one weight a template needs templates alone"
        )
    texts = encode_captions(encoder.clip, [text for group in prompts for text in group], encoder=encoder)
    images, labels = image_features.float().cpu(), torch.tensor(data.labels)

    def measure(weights: Tensor | None) -> ClassificationResult:
        logits = prompt_logits(encoder.clip, images, pool_prompts(texts, counts, weights))
        sigmoid = encoder.clip.logit_bias is not None
        return classification_metrics(logits, labels, data.classes, sigmoid=sigmoid)

    scale = float(encoder.clip.logit_scale.detach().float().exp())
    weights = _minimise(scale * images.double(), labels, texts.double(), counts, shared).float()
    rounded = [
        tuple(round(weight, _DIGITS) for weight in part.tolist()) for part in torch.split(weights, counts)
    ]
    groups = tuple(WeightedPrompts(tuple(group), part) for group, part in zip(prompts, rounded, strict=True))
    return PromptEnsemble(groups, measure(None), measure(torch.tensor([w for part in rounded for w in part])))


def _minimise(images: Tensor, labels: Tensor, texts: Tensor, counts: Sequence[int], shared: bool) -> Tensor:
    """Return the weights of all prompts (P,), 1 on average in each class, by L-BFGS from uniform ones."""
    free = torch.zeros(counts[0] if shared else sum(counts), dtype=torch.float64, requires_grad=True)
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free, sharpness], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def weights() -> Tensor:
        groups = [free] * len(counts) if shared else torch.split(free, list(counts))
        return torch.cat([len(group) * group.softmax(0) for group in groups])

    def loss() -> Tensor:
        optimizer.zero_grad()
        cosines = images @ pool_prompts(texts, counts, weights()).T
        error = F.cross_entropy(sharpness.exp() * cosines, labels)
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights().detach()
