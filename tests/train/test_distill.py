"""Distillation: its terms by hand, and students that come to agree with their teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import clipgraft as cg
from clipgraft.compact.model import compact_model
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.errors import CheckpointError, ConfigError
from clipgraft.models.clip import Clip, family_of
from clipgraft.train import inputs as inputs_module
from clipgraft.train.args import DistillArgs
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.loop import Loop
from clipgraft.train.recipes.distillation import (
    Distilled,
    Teacher,
    feature_distance,
    similarity_divergence,
)
from fitting import groups

Distil = Callable[..., cg.train.FitResult]


def make_student(teacher: Clip) -> Clip:
    """One block a tower of the tiny teacher's two."""
    return compact_model(teacher, text_layers=1, vision_layers=1).clip


@pytest.fixture
def distil(pairs: cg.Pairs, tmp_path: Path) -> Distil:
    """Two epochs of six steps of four pairs."""

    def run(student: Clip, teacher: Clip, **options: Any) -> cg.train.FitResult:
        given = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "out": tmp_path / "run", **options}
        return cg.distill(student, teacher, pairs, **groups(workers=0, progress=False, **given))

    return run


def agreement(student: Clip, teacher: Clip, pairs: cg.Pairs) -> float:
    """Mean cosine between the features of both, images and captions alike."""
    texts = [caption for captions in pairs.captions for caption in captions]
    images = [encode_images(clip, pairs.images, workers=0) for clip in (student, teacher)]
    captions = [encode_captions(clip, texts) for clip in (student, teacher)]
    return float(((images[0] * images[1]).sum(1).mean() + (captions[0] * captions[1]).sum(1).mean()) / 2)


def kl(p: list[float], q: list[float]) -> float:
    """The divergence by its definition."""
    return sum(a * float(torch.tensor(a / b).log()) for a, b in zip(p, q, strict=True))


def test_terms_by_hand() -> None:
    """A weight of 1 does not mean what the documentation says."""
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    wanted = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert feature_distance(images, wanted).item() == pytest.approx((0 + (1 - 0.8)) / 2)
    zero = torch.tensor(0.0)
    found = similarity_divergence((images, texts, zero), (wanted, images, torch.tensor(2.0).log()))
    # Logits: of the teacher 2 * [[1, 0], [0.6, 0.8]], of the student [[1, 1], [0, 0]].
    teacher = torch.tensor([[2.0, 0.0], [1.2, 1.6]], dtype=torch.float64)
    student = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    rows = sum(
        kl(p.softmax(0).tolist(), q.softmax(0).tolist())
        for p, q in [*zip(teacher, student, strict=True), *zip(teacher.T, student.T, strict=True)]
    )
    assert found.item() == pytest.approx(rows / 4, rel=1e-5)
    assert similarity_divergence((images, texts, zero), (images, texts, zero)).item() == pytest.approx(0)


class _Fixed:
    """An objective whose loss is a number."""

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return []

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        return lambda images, texts: images.sum() * 0 + 7.0


def test_terms_are_weighed_and_rows_are_matched() -> None:
    """A student is held against the teacher's features of other images, or in pieces against other sums."""
    torch.manual_seed(0)
    unit = nn.functional.normalize
    teacher = Teacher(unit(torch.randn(5, 3), dim=1), unit(torch.randn(6, 3), dim=1), 1.0)
    ids, captions = torch.tensor([4, 0, 2]), torch.tensor([5, 1, 1])
    scale = torch.tensor(0.5)
    whole = MicroBatch(ids, captions, None, torch.zeros(3))
    halves = [MicroBatch(ids[part], captions[part], None, torch.zeros(3)) for part in ([0], [1, 2])]
    images, texts = torch.randn(3, 3), torch.randn(3, 3)
    taught: tuple[Tensor, Tensor, Tensor] = (teacher.images[ids], teacher.texts[captions], torch.tensor(1.0))
    near = (feature_distance(images, taught[0]) + feature_distance(texts, taught[1])) / 2
    alike = similarity_divergence((images, texts, scale), taught)
    objective = Distilled(_Fixed(), teacher, DistillArgs(contrastive=2.0, feature=3.0, similarity=5.0), scale)
    total = (14 + 3 * near + 5 * alike).item()
    for batch in ([whole], halves):
        assert objective.loss(batch)(images, texts).item() == pytest.approx(total)
    silent = replace(objective, weights=DistillArgs(contrastive=0.0, feature=0.0, similarity=1.0))
    assert silent.loss([whole])(images, texts).item() == pytest.approx(alike.item())


@pytest.mark.parametrize("without", [("contrastive", "similarity"), ("contrastive", "feature"), ()])
def test_students_come_to_agree(
    hf_clip: Clip, pairs: cg.Pairs, distil: Distil, without: tuple[str, ...]
) -> None:
    """A distilled model is no nearer to its base than one that was only cut, or the base has changed."""
    before, student = copy.deepcopy(hf_clip.model.state_dict()), make_student(hf_clip)
    far = agreement(student, hf_clip, pairs)
    result = distil(student, hf_clip, epochs=8, val=pairs, **dict.fromkeys(without, 0))
    if "feature" not in without:
        assert agreement(student, hf_clip, pairs) > far + 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in hf_clip.model.state_dict().items())
    assert all(weight.grad is None for weight in hf_clip.model.parameters())
    events = map(json.loads, (result.folder / "events.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if "loss" in event]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert "image_to_text_R@1" in result.history[-1]
    kept = cg.load(result.saved).model.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in student.model.state_dict().items())


def test_the_teacher_runs_once(hf_clip: Clip, distil: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch pays for the large model again."""
    calls = []
    stock = inputs_module.encode_images
    monkeypatch.setattr(
        inputs_module, "encode_images", lambda clip, *a, **k: (calls.append(clip), stock(clip, *a, **k))[1]
    )
    distil(make_student(hf_clip), hf_clip)
    assert calls == [hf_clip]


def test_an_adapter_can_be_the_student(hf_clip: Clip, distil: Distil) -> None:
    """Distilling into an adapter trains the student's base, or saves no adapter."""
    student = make_student(hf_clip)
    base = student.fingerprint
    cg.apply_lora(student, r=2, targets="all-linear")
    result = distil(student, hf_clip)
    assert student.fingerprint == base
    assert cg.read_adapter(result.saved).fingerprint == base


def test_goes_on_to_the_same_bits(
    hf_clip: Clip, distil: Distil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A distillation that was killed ends elsewhere than one that was not, or goes on with other weights."""
    straight = make_student(hf_clip)
    distil(straight, hf_clip, out=tmp_path / "straight")
    step = Loop.step

    def dies(self: Loop, batch: Any, number: int) -> Any:
        if number == 9:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(Loop, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        distil(make_student(hf_clip), hf_clip, checkpoint_steps=2)
    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(CheckpointError, match="weights"):
        distil(make_student(hf_clip), hf_clip, checkpoint_steps=2, resume=True, feature=2.0)
    again = make_student(hf_clip)
    distil(again, hf_clip, checkpoint_steps=2, resume=True)
    wanted = straight.model.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in again.model.state_dict().items())


def test_what_is_refused(hf_clip: Clip, make_hf: Callable[..., nn.Module], distil: Distil) -> None:
    """A weight that turns the loss around, or features of two sizes, are found out while training."""
    student = make_student(hf_clip)
    for options, message in (
        ({"feature": -1.0}, "DistillArgs: feature: got -1.0, allowed is greater than or equal to 0"),
        ({"similarity": float("nan")}, "DistillArgs: similarity: got nan"),
        ({"contrastive": 0, "feature": 0, "similarity": 0}, "are all 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            distil(student, hf_clip, **options)
    config = CLIPConfig(**{**hf_clip.model.config.to_dict(), "projection_dim": 8})
    config.text_config.projection_dim = config.vision_config.projection_dim = 8
    model = CLIPModel(config).eval()
    other = replace(hf_clip, model=model, family=family_of(model))
    with pytest.raises(ConfigError, match="have 8 numbers and the teacher's 24: give `feature=0`"):
        distil(other, hf_clip)
    assert distil(other, hf_clip, feature=0).trainable > 0
