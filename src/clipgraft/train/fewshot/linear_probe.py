"""A linear probe that starts as the class texts, and is held near them.

That a probe is to start there, and to be held by a penalty with one setting for all data, is from
Silva-Rodríguez et al. 2024, *A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models*
(arXiv:2312.12730). Their penalty is weak where a base is unsure of its classes, and leaves a probe of few
shots worse than zero-shot; here it is as large as the temperature, so that the minimum is at

    w_c - t_c = ½ · C/N · Σ_i (y_ic - p_ic) · f_i,

whatever the temperature and the number of classes are. It is the only minimum, for the loss is strictly
convex: neither a seed nor a learning rate plays a part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.train.fewshot.args import FeatureModeArgs
from clipgraft.train.fewshot.features import FewShotFeatures, LinearClassifier, zero_shot

_ITERATIONS = 200


class LinearProbe:
    """One vector a class, no bias: multinomial logistic regression around the class texts, by L-BFGS."""

    name = "linear-probe"

    def fit(self, features: FewShotFeatures, options: FeatureModeArgs, seed: int) -> LinearClassifier:
        """Minimise the cross-entropy of all views at the model's temperature, plus the penalty."""
        start = zero_shot(features)
        steps = _ITERATIONS if options.feature_epochs is None else options.feature_epochs
        penalty = features.logit_scale if options.penalty is None else options.penalty
        images, texts = features.unit().flatten(0, 1).double(), features.texts.double()
        labels = features.labels.repeat(len(features.views))
        weights = texts.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            error = F.cross_entropy(features.logit_scale * images @ weights.T, labels)
            total = error + penalty * (weights - texts).square().sum(-1).mean()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        if steps:
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        trained = weights.detach().float()
        return replace(start, weights=trained, trained_weights=trained.numel())
