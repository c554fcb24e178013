"""`fit_classifier` from labelled pictures to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.evaluate.classification import evaluate_classification
from clipgraft.evaluate.head import Head, load_head
from clipgraft.train.feed import MicroBatch
from clipgraft.train.fit import fit_classifier
from clipgraft.train.recipes.classification import Prompted
from fitting import groups

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
PROMPTS = (("a blue picture", "something blue"), ("a green picture",), ("a red picture", "red", "all red"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Twelve pictures of each of three colours, each a little different."""
    folder = tmp_path_factory.mktemp("colours")
    images, labels = [], []
    for label, name in enumerate(sorted(COLOURS)):
        for number in range(12):
            shade = tuple(min(255, value + 3 * number) for value in COLOURS[name])
            path = folder / f"{name}{number}.png"
            Image.new("RGB", (40, 40), shade).save(path)
            images.append(path)
            labels.append(label)
    return Labelled(tuple(images), tuple(labels), tuple(sorted(COLOURS)))


OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 12, "lr": 5e-3, "workers": 0, "progress": False}


@pytest.mark.parametrize("targets", ["text-attention", "vision.1.*", "attention"])
@pytest.mark.parametrize("head", ["prompts", "linear", "cosine"])
def test_it_learns_the_classes(
    targets: str, head: Any, make_clip: Any, data: Labelled, tmp_path: Path
) -> None:
    """A classification run learns nothing, or what it saves is not what it trained."""
    clip = make_clip()
    before = evaluate_classification(clip, data, PROMPTS).metrics
    cg.apply_lora(clip, r=4, targets=targets)
    if head != "prompts" and not targets.startswith("vision"):
        with pytest.raises(cg.errors.ConfigError, match=f"`head={head}` reads no texts"):
            fit_classifier(clip, data, **groups(prompts=PROMPTS, out=tmp_path / "run", head=head, **OPTIONS))
        return
    result = fit_classifier(
        clip, data, data, **groups(prompts=PROMPTS, out=tmp_path / "run", head=head, **OPTIONS)
    )
    assert result.history[-1]["loss"] < before["loss"]
    assert result.history[-1]["acc1"] > 0.6
    other = make_clip()
    cg.load_adapter(other, result.saved)
    if head == "prompts":
        again = evaluate_classification(other, data, PROMPTS).metrics
        assert again["loss"] == pytest.approx(result.history[-1]["loss"], abs=1e-4)
        return
    loaded, classes = load_head(result.folder / "head")
    assert classes == data.classes
    assert loaded.kind == head
    of_head = sum(parameter.numel() for parameter in loaded.parameters())
    assert result.trainable == cg.count_parameters(clip).lora + of_head


def test_a_head_alone(make_clip: Any, data: Labelled, tmp_path: Path) -> None:
    """A linear probe on a frozen base is refused, or starts elsewhere than zero-shot classification."""
    clip = make_clip()
    zero_shot = evaluate_classification(clip, data, PROMPTS)
    options = {**OPTIONS, "lock_image": True, "lock_text": True}
    result = fit_classifier(
        clip,
        data,
        data,
        **groups(prompts=PROMPTS, out=tmp_path / "run", head="linear", **{**options, "lr": 1e-12}),
    )
    assert result.history[0]["loss"] == pytest.approx(zero_shot.metrics["loss"], rel=1e-3)
    assert result.trainable == 3 * load_head(result.folder / "head")[0].weight.shape[1] + 3  # and biases
    with pytest.raises(cg.errors.ConfigError, match="nothing to train"):
        fit_classifier(make_clip(), data, **groups(prompts=PROMPTS, out=tmp_path / "none", **options))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_cross_entropy_over_averaged_prompts(weighted: bool, make_clip: Any) -> None:
    """Equal classes count as negatives, prompts are not averaged, or accumulation changes the gradients."""
    clip = make_clip()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 24, generator=generator, requires_grad=True)
    texts = torch.randn(6, 24, generator=generator, requires_grad=True)
    labels, weights = torch.tensor([0, 1, 1, 2, 0, 2]), torch.tensor([0.5, 1.0, 2.0])
    counts = [len(group) for group in PROMPTS]
    shares = None if not weighted else torch.tensor([0.5, 1.5, 1.0, 1.0, 0.0, 2.0])
    objective = Prompted(
        clip, lambda part: images[part.image_ids], lambda: texts, counts, torch.arange(3), weights, shares
    )
    parts = [
        MicroBatch(rows, labels[rows], None, torch.zeros(len(rows))) for rows in torch.arange(6).split(2)
    ]
    features = [encode() for encode in objective.parts(parts)]
    assert len(features) == 4  # the prompts once, and three micro-batches
    loss = objective.loss(parts)(torch.cat([f[0] for f in features]), torch.cat([f[1] for f in features]))
    unit = F.normalize(texts, dim=-1)
    if shares is not None:
        unit = torch.stack([share * row for share, row in zip(shares.tolist(), unit, strict=True)])
    means = torch.stack([unit[:2].mean(0), unit[2], unit[3:].mean(0)])
    logits = clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(means, dim=-1).T
    rows = -torch.log_softmax(logits, dim=-1)[torch.arange(6), labels]
    wanted = (rows * weights[labels]).sum() / weights[labels].sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_is_refused(make_clip: Any, data: Labelled, tmp_path: Path) -> None:
    """Prompts of another data set, or other classes in validation, train a classifier of nothing."""
    clip = make_clip()
    cg.apply_lora(clip)
    with pytest.raises(cg.errors.DataError, match="2 of 3 classes have a prompt"):
        fit_classifier(clip, data, **groups(prompts=PROMPTS[:2], out=tmp_path / "a", **OPTIONS))
    other = Labelled(data.images[:1], (0,), ("purple",))
    with pytest.raises(cg.errors.DataError, match="different classes, blue, green, purple, red"):
        fit_classifier(clip, data, other, **groups(prompts=PROMPTS, out=tmp_path / "b", **OPTIONS))


def test_a_cosine_head_ignores_lengths() -> None:
    """A cosine head is a linear one by another name."""
    head = Head("cosine", F.normalize(torch.randn(3, 8), dim=-1), 10.0)
    x = torch.randn(4, 8)
    before = head(x)
    with torch.no_grad():
        head.weight.mul_(3)
    assert torch.allclose(head(2 * x), before, atol=1e-5)
