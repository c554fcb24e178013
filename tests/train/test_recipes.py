"""A recipe is one class: what it learns and from what; all the rest is the same for every recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from clipgraft.data.args import FeatureArgs
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.models.clip import Clip
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.contrastive import Contrastive
from clipgraft.train.recipes.pair_losses import SoftmaxLoss
from clipgraft.train.recipes.recipe import Recipe
from clipgraft.train.run import run_recipe

NO_CACHE = FeatureArgs(workers=0)


@dataclass(frozen=True)
class Sigmoid:
    """The sigmoid loss of SigLIP (arXiv:2303.15343): every pair of a batch is judged by itself."""

    features: Contrastive
    logit_scale: Tensor

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return self.features.parts(batch)

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        def loss(images: Tensor, texts: Tensor) -> Tensor:
            cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
            signs = 2 * torch.eye(len(cosines), device=cosines.device) - 1
            return -F.logsigmoid(signs * self.logit_scale.float().exp() * cosines).sum(dim=1).mean()

        return loss


class SigmoidRecipe(Recipe):
    """A fourth recipe, in one class."""

    def settings(self) -> dict[str, Any]:
        return {"recipe": "sigmoid"}

    def objective(self, inputs: Inputs) -> Sigmoid:
        clip = inputs.setup.clip
        pairs = Contrastive(clip, inputs.images, inputs.texts, SoftmaxLoss(clip.logit_scale))
        return Sigmoid(pairs, clip.logit_scale)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val is not None
        return measure_retrieval(inputs.encoder, self.val, inputs.val_features(self.val.images))


def run(clip: Clip, pairs: cg.Pairs, out: Path, epochs: int, resume: bool = False) -> cg.train.FitResult:
    torch.manual_seed(0)
    cg.apply_lora(clip, r=2)
    args = TrainArgs(batch_size=8, epochs=epochs, epoch_parts=(1,) * epochs, lr=3e-3, warmup=0)
    keep = RunArgs(out=out, resume=resume, progress=False)
    return run_recipe(clip, SigmoidRecipe(pairs, pairs), args, keep, NO_CACHE)


def test_a_fourth_recipe_costs_one_class(
    make_clip: Callable[[], Clip], pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Every kind of training would copy inputs, features, resume and saving from the others."""
    result = run(make_clip(), pairs, tmp_path / "whole", 2)
    assert [line["epoch"] for line in result.history] == [1, 2]
    assert result.saved.is_dir()
    assert recorded_settings(tmp_path / "whole" / "checkpoints" / "latest.pt")["recipe"] == "sigmoid"
    assert "epoch 2: image_to_text_R@1" in (tmp_path / "whole" / "out.log").read_text()
    run(make_clip(), pairs, tmp_path / "parts", 1)
    resumed = run(make_clip(), pairs, tmp_path / "parts", 2, resume=True)
    first, second = (
        torch.load(found.folder / "checkpoints" / "latest.pt", weights_only=True)["weights"]
        for found in (result, resumed)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_recipe_says_what_it_minimises() -> None:
    """A class without an objective would train something else."""
    with pytest.raises(TypeError, match="abstract"):
        Recipe(cg.Pairs((), ()))  # type: ignore[abstract]
