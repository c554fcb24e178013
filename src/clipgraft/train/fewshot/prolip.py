"""ProLIP: train the last linear map of the image tower, held near what it was.

Fahes et al. 2024, *CLIP's Visual Embedding Projector is a Few-shot Cornucopia* (arXiv:2410.05270), in the
form that needs no validation images: cross-entropy + ‖W - W₀‖² / shots, at the learning rate that did best
with it in the paper's table 2. What it learns is a change of one weight, so it is also a LoRA adapter,
exactly at full rank, which works wherever adapters do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.engine.encoder import Encoder
from clipgraft.errors import AdapterError
from clipgraft.lora.combine import cut
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.inject import attach
from clipgraft.lora.state import Adapter, lora_state
from clipgraft.lora.variants import PlainLora
from clipgraft.models.clip import Clip
from clipgraft.train.fewshot.args import FeatureModeArgs
from clipgraft.train.fewshot.features import FewShotFeatures, LinearClassifier, zero_shot
from clipgraft.train.fewshot.steps import take_steps

_EPOCHS, _LR, _EPS = 300, 1e-4, 1e-4


class ProLip:
    """The projection trains: Adam, 300 steps on all images at once, as the paper has it.

    A tower without a projection is given one that starts as the identity, the paper's regularised linear
    adapter.
    """

    name = "prolip"

    def fit(self, features: FewShotFeatures, options: FeatureModeArgs, seed: int) -> LinearClassifier:
        """Train the projection; class texts and a bias stay, and `seed` plays no part."""
        start = features.projection.weight
        if start is None:
            start = torch.eye(features.views.shape[-1])
        weight = start.clone().requires_grad_()
        penalty = 1 / features.shots if options.penalty is None else options.penalty
        epochs = _EPOCHS if options.feature_epochs is None else options.feature_epochs

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            error = F.cross_entropy(with_projection(features, weight).logits(images), labels)
            return error + penalty * (weight - start).square().sum()

        optimizer = torch.optim.Adam([weight], lr=options.feature_lr or _LR, eps=_EPS)
        take_steps(optimizer, loss, features.views, features.labels, epochs=epochs, seed=seed)
        return with_projection(features, weight.detach())


def with_projection(features: FewShotFeatures, weight: Tensor) -> LinearClassifier:
    """The class texts behind another projection, (D, E)."""
    projection = replace(features.projection, weight=weight)
    return replace(zero_shot(features), projection=projection, trained_weights=weight.numel())


def attach_projection(
    clip: Clip, classifier: LinearClassifier, name: str = "prolip", *, rank: int | None = None
) -> Adapter:
    """Attach a trained projection to its base as a LoRA adapter, which then acts.

    Args:
        clip: the base that the features are of, without an active adapter.
        classifier: what `ProLip.fit` made.
        name: of the adapter.
        rank: cut the change of the weight to the nearest of this rank; None: the change itself, which has
            full rank.

    Raises:
        AdapterError: an adapter acts, the base has no vision projection, or one of another shape.
    """
    part, learnt, state = Encoder(clip).vision_projection, classifier.projection.weight, lora_state(clip)
    if state is not None and state.in_effect is not None:
        raise AdapterError(f"an adapter acts, {state.active!r}: disable it, or merge and remove it first")
    if part is None or learnt is None or part.matrix.shape != learnt.shape:
        raise AdapterError("the classifier has no trained projection of this base's image tower to attach")
    change = learnt - part.matrix.detach().float().cpu()
    a, b = cut(change, torch.eye(len(change)), len(change) if rank is None else rank)
    settings = LoraConfig(r=len(a), alpha=len(a), targets=str(part.site))
    adapter = attach(clip, settings, name)
    layer = adapter.layers[part.site]
    assert isinstance(layer, PlainLora)
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
    return adapter
