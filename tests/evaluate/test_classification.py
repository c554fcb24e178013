"""Classification: numbers against their definitions and CLIP_benchmark, features against its classifier."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import accuracy, run_classification, zero_shot_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipgraft.adapters.open import load
from clipgraft.data.datasets import Labelled
from clipgraft.data.features import encode_images
from clipgraft.data.prompts import TEMPLATE_SETS, class_prompts
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError, TrainingError
from clipgraft.evaluate.classification import (
    class_features,
    classification_metrics,
    evaluate_classification,
    pool_prompts,
)
from clipgraft.lora.control import lora_disabled
from clipgraft.lora.inject import apply_lora
from clipgraft.models.clip import Clip
from tiny_pictures import write_pictures
from tiny_siglip import siglip_clip

CLASSES = ("cat", "fire_engine", "dog")


def problem(rows: int, size: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    g = torch.Generator().manual_seed(seed)
    logits, labels = scale * torch.randn(rows, size, generator=g), torch.randint(size, (rows,), generator=g)
    return logits, labels, tuple(f"class {index}" for index in range(size))


def naive(
    logits: list[list[float]], labels: list[int], size: int, sigmoid: bool = False
) -> tuple[dict[str, float], list[list[int]]]:
    """The definitions, one image at a time. Without ties."""
    confusion = [[0] * size for _ in range(size)]
    loss, top5, bins = 0.0, 0, [[0.0, 0.0] for _ in range(15)]
    for row, label in zip(logits, labels, strict=True):
        powers = [math.exp(value - max(row)) for value in row]
        shares = [power / sum(powers) for power in powers]
        order = sorted(range(size), key=lambda index: -row[index])
        confusion[label][order[0]] += 1
        top5 += label in order[:5]
        loss -= math.log(shares[label])
        if sigmoid:
            shares = [1 / (1 + math.exp(-value)) for value in row]
        (inside,) = [m for m in range(15) if m / 15 < max(shares) <= (m + 1) / 15]
        bins[inside][0] += order[0] == label
        bins[inside][1] += max(shares)
    n = len(labels)
    recalls = [confusion[c][c] / sum(confusion[c]) for c in range(size) if sum(confusion[c])]
    metrics = {
        "acc1": sum(confusion[c][c] for c in range(size)) / n,
        "acc5": top5 / n,
        "mean_per_class_recall": sum(recalls) / len(recalls),
        "loss": loss / n,
        "ece": sum(abs(right - confidence) for right, confidence in bins) / n,
    }
    return metrics, confusion


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.05, 1.0, 5.0, 30.0]),
    sigmoid=st.booleans(),
)
def test_metrics_are_their_definitions(rows: int, size: int, seed: int, scale: float, sigmoid: bool) -> None:
    """An accuracy, a loss or a calibration error that somebody acts on would be wrong."""
    logits, labels, classes = problem(rows, size, seed, scale)
    got = classification_metrics(logits, labels, classes, sigmoid=sigmoid)
    metrics, confusion = naive(logits.double().tolist(), labels.tolist(), size, sigmoid)
    assert got.metrics == pytest.approx(metrics, rel=1e-9, abs=1e-9)
    assert got.confusion.tolist() == confusion
    for c, row in enumerate(got.per_class):
        guessed = sum(line[c] for line in confusion)
        assert (row.name, row.count) == (classes[c], sum(confusion[c]))
        assert row.recall == (confusion[c][c] / row.count if row.count else None)
        assert row.precision == (confusion[c][c] / guessed if guessed else None)


@pytest.mark.parametrize("size", [5, 11])
def test_accuracy_is_clip_benchmarks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers under CLIP_benchmark's names are not the ones in its published tables."""
    from sklearn.metrics import balanced_accuracy_score

    # It makes a float of an array with one element, which numpy 2.4 refuses.
    monkeypatch.setattr(Tensor, "numpy", Tensor.item)
    logits, labels, classes = problem(300, size, seed=size)
    theirs = accuracy(logits, labels, topk=(1, 5))
    monkeypatch.undo()
    got = classification_metrics(logits, labels, classes).metrics
    assert [got["acc1"], got["acc5"]] == pytest.approx(theirs)
    assert got["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))


def test_many_rows_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large data set would lose rows where it is divided."""
    logits, labels, classes = problem(100, 4, seed=0)
    whole = classification_metrics(logits, labels, classes)
    monkeypatch.setattr("clipgraft.evaluate.classification._ROWS", 7)
    parts = classification_metrics(logits, labels, classes)
    assert parts.metrics == whole.metrics
    assert parts.confusion.equal(whole.confusion)


@settings(max_examples=30)
@given(st.integers(2, 8), st.floats(-100, 100), st.integers(0, 2**31))
def test_a_constant_classifier_is_always_wrong(size: int, value: float, seed: int) -> None:
    """A collapsed model would score whatever share the first class has."""
    labels = torch.randint(size, (20,), generator=torch.Generator().manual_seed(seed))
    got = classification_metrics(torch.full((20, size), value), labels, tuple(map(str, range(size))))
    assert got.metrics["acc1"] == got.metrics["mean_per_class_recall"] == 0
    assert got.metrics["acc5"] == (1.0 if size <= 5 else 0.0)
    assert got.metrics["loss"] == pytest.approx(math.log(size))
    assert got.confusion.diagonal().sum() == 0
    assert got.confusion.sum() == 20


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_the_table_agrees_with_the_accuracy(seed: int, values: int) -> None:
    """With ties, the confusion table would show another accuracy than the headline."""
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randint(values, (30, 6), generator=g).float(), torch.randint(6, (30,), generator=g)
    got = classification_metrics(logits, labels, tuple("abcdef"))
    assert int(got.confusion.diagonal().sum()) / 30 == pytest.approx(got.metrics["acc1"])
    assert got.confusion.sum(1).tolist() == torch.bincount(labels, minlength=6).tolist()


def test_unusable_input() -> None:
    """A diverged model, or labels of another data set, would give an ordinary looking score."""
    logits, labels, classes = problem(4, 3, seed=0)
    logits[2, 1] = math.nan
    with pytest.raises(TrainingError, match=r"1 of 4 rows \(first: row 2\)"):
        classification_metrics(logits, labels, classes)
    with pytest.raises(DataError, match="no image"):
        classification_metrics(torch.empty(0, 3), torch.empty(0, dtype=torch.long), classes)
    with pytest.raises(DataError, match=r"outside 0\.\.2"):
        classification_metrics(torch.zeros(1, 3), torch.tensor([3]), classes)
    with pytest.raises(DataError, match="do not fit"):
        classification_metrics(torch.zeros(1, 3), torch.tensor([0]), classes[:2])


def test_gradients_reach_every_prompt() -> None:
    """Training through class features would leave some prompts out."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pool_prompts(rows, [2, 3])[:, 0].sum().backward()
    assert rows.grad is not None
    assert (rows.grad.abs().sum(1) > 0).all()


@pytest.fixture
def clip(tiny_config: Path) -> Clip:
    return load(str(tiny_config), "none")


@pytest.mark.parametrize("chosen", ["photo", "ensemble"])
def test_class_features_are_clip_benchmarks(clip: Clip, chosen: str) -> None:
    """Zero-shot accuracy would not be what others measure for the same model and prompts."""
    templates = TEMPLATE_SETS[chosen]
    theirs = zero_shot_classifier(
        clip.model,
        lambda texts: clip.tokenize(texts),
        ["cat", "fire engine", "dog"],
        [template.replace("{}", "{c}") for template in templates],
        "cpu",
        amp=False,
    )
    prompts = class_prompts(CLASSES, None, templates)
    ours = class_features(clip, prompts)
    assert torch.allclose(ours, theirs.T, atol=1e-5)
    assert torch.equal(class_features(Encoder(clip), prompts), ours)


def test_different_numbers_of_prompts(clip: Clip) -> None:
    """A class with more prompts than others would take those of its neighbour."""
    prompts = (("a cat", "two cats", "the cat"), ("a dog",))
    rows = clip.encode_text([text for group in prompts for text in group], normalize=True).detach()
    cat = rows[:3].mean(0)
    wanted = torch.stack([cat / cat.norm(), rows[3]])
    assert torch.allclose(class_features(clip, prompts), wanted, atol=1e-5)
    with pytest.raises(DataError, match="class 1 has no prompt"):
        class_features(clip, (("a cat",), ()))


@pytest.fixture
def data(tmp_path: Path) -> Labelled:
    write_pictures(tmp_path)
    images = tuple(tmp_path / f"{index}.png" for index in range(12))
    return Labelled(images, tuple(index % 3 for index in range(12)), CLASSES)


def reference(clip: Clip, data: Labelled, prompts: tuple[tuple[str, ...], ...]) -> Tensor:
    """Logits by CLIP_benchmark, at the model's own temperature."""
    from PIL import Image

    pixels = torch.stack([clip.require_preprocess()(Image.open(path).convert("RGB")) for path in data.images])
    named = dict(zip(data.classes, map(list, prompts), strict=True))
    weights = zero_shot_classifier(
        clip.model, lambda texts: clip.tokenize(texts), list(data.classes), named, "cpu", amp=False
    )
    logits, _ = run_classification(
        clip.model, weights, [(pixels, torch.tensor(data.labels))], "cpu", amp=False
    )
    return logits / 100 * clip.logit_scale.detach().exp()


def test_evaluation_is_clip_benchmarks(clip: Clip, data: Labelled) -> None:
    """Accuracy from files would differ from what the model itself gives: other pixels, prompts or scale."""
    prompts = class_prompts(data.classes, None)
    wanted = classification_metrics(reference(clip, data, prompts), torch.tensor(data.labels), data.classes)
    got = evaluate_classification(clip, data, prompts, workers=0, batch_size=5, exact_preprocess=True)
    assert got.metrics == pytest.approx(wanted.metrics, abs=1e-4)
    assert got.confusion.equal(wanted.confusion)


def test_an_adapter_is_measured(clip: Clip, data: Labelled) -> None:
    """The adapter's accuracy would be the base's."""
    prompts = class_prompts(data.classes, None)
    features = encode_images(clip, data.images, workers=0)
    base = evaluate_classification(clip, data, prompts, workers=0)
    apply_lora(clip, r=2, targets="text-attention")
    with torch.no_grad():
        for name, weight in clip.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    adapted = evaluate_classification(clip, data, prompts, image_features=features)
    assert adapted.metrics["loss"] != pytest.approx(base.metrics["loss"], rel=1e-3)
    with lora_disabled(clip):
        again = evaluate_classification(clip, data, prompts, image_features=features)
    assert again.metrics == pytest.approx(base.metrics, abs=1e-5)


def test_a_siglips_probabilities_are_its_own_sigmoids(data: Labelled) -> None:
    """The calibration of a SigLIP would be that of a softmax, which nobody who uses one computes."""
    clip = siglip_clip()
    prompts = tuple((f"a photo of a {name}",) for name in data.classes)
    result = evaluate_classification(clip, data, prompts, workers=0, exact_preprocess=True)
    pixels = torch.stack([clip.pixels(path)[0] for path in data.images])
    with torch.no_grad():
        tokens = clip.tokenize([prompt for (prompt,) in prompts])
        logits = clip.model(input_ids=tokens, pixel_values=pixels).logits_per_image
    confidence = logits.sigmoid().max(1).values
    right = (logits.argmax(1) == torch.tensor(data.labels)).float()
    bins = (confidence * 15).ceil()
    gaps = [((bins == number) * (right - confidence)).sum().abs() for number in range(16)]
    assert result.metrics["ece"] == pytest.approx(float(sum(gaps)) / len(right), abs=1e-6)
    assert result.metrics["acc1"] == pytest.approx(float(right.mean()))


def test_raw_models_are_taken(tiny_openclip: nn.Module, data: Labelled) -> None:
    """A model that a user already holds would have to be loaded again."""
    prompts = class_prompts(data.classes, None)
    features = nn.functional.normalize(torch.randn(12, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    got = evaluate_classification(tiny_openclip, data, prompts, image_features=features)
    assert sum(row.count for row in got.per_class) == 12


def test_prompts_must_fit_the_classes(clip: Clip, data: Labelled) -> None:
    """Prompts of other classes would be taken for these, and every label be off."""
    with pytest.raises(DataError, match="prompts of 2 classes for 3"):
        evaluate_classification(clip, data, class_prompts(("cat", "dog"), None))
