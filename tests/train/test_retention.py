"""What a model is held to: the loss by hand, what it keeps, its weight, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clipgraft as cg
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.retained import FEWEST, Retained, retained_texts
from clipgraft.errors import CheckpointError, ConfigError, DataError
from clipgraft.models.clip import Clip
from clipgraft.train import retention
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.retention import (
    WEIGHT,
    WEIGHTS,
    Anchors,
    Retaining,
    WeightTrial,
    hold_to_base,
    largest_harmless,
)
from fitting import groups, prepared

MakeClip = Callable[[], Clip]
_SIMILARITY = 0.03
TEXTS = tuple(f"an old word number {number}" for number in range(60))
QUICK: dict[str, Any] = {"batch_size": 4, "epochs": 6, "lr": 1e-2, "workers": 0, "progress": False}


def adapted(make_clip: MakeClip, targets: str = "text-linear", **options: Any) -> Clip:
    clip = make_clip()
    torch.manual_seed(0)
    cg.apply_lora(clip, **{"r": 4, "targets": targets, **options})
    return clip


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> cg.train.FitResult:
    return cg.fit(clip, pairs, **groups(out=out, **{**QUICK, **options}))


def drift(clip: Clip, base: Clip, texts: Sequence[str]) -> float:
    """How far the features of texts are from the base's, as a mean cosine distance."""
    now, before = (encode_captions(model, texts) for model in (clip, base))
    return float(1 - F.cosine_similarity(now, before).mean())


class Sums:
    """An objective that says what it was given."""

    def __init__(self, width: int = 2) -> None:
        self.width = width
        self.images = self.texts = torch.empty(0)

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return [
            lambda: (torch.ones(2, self.width), torch.full((2, self.width), 3.0)),
            lambda: (torch.ones(1, self.width), torch.zeros(1, self.width)),
        ]

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        def loss(images: Tensor, texts: Tensor) -> Tensor:
            self.images, self.texts = images, texts
            return torch.tensor(5.0)

        return loss


def batch_of(*sizes: int) -> list[MicroBatch]:
    return [
        MicroBatch(torch.arange(size), torch.arange(size) + size, None, torch.zeros(size, dtype=torch.int64))
        for size in sizes
    ]


def test_the_loss_by_hand() -> None:
    """A weight would not mean what its description says, or the task would see texts that are not its own."""
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    now = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    task = Sums()
    anchors = Anchors(base, lambda ids: now[ids], 0.0)
    held = Retaining(task, anchors, weight=10.0, most=8, logit_scale=torch.tensor(0.0))
    batch = batch_of(2, 1)
    parts = [encode() for encode in held.parts(batch)]
    images, texts = (torch.cat(tower) for tower in zip(*parts, strict=True))
    assert len(texts) == 2 + 3
    found = held.loss(batch)(images, texts)
    assert found.item() == pytest.approx(5.0 + 10.0 * (0.0 + (1 - 0.8)) / 2)
    assert torch.equal(task.texts, texts[2:])


def test_other_processes_encode_no_texts() -> None:
    """The texts of a step would be counted once for every process."""
    anchors = Anchors(torch.eye(2), lambda ids: torch.eye(2)[ids], 0.0)
    held = Retaining(Sums(), anchors, 1.0, 8, torch.tensor(0.0), is_rank0=False)
    assert [len(encode()[1]) for encode in held.parts(batch_of(2, 1))] == [2, 1]


def test_a_step_draws_texts_by_its_batch_alone() -> None:
    """A resumed run would hold its model to other texts, and end with other bits."""
    anchors = Anchors(torch.zeros(500, 2), None, 0.0)
    held = Retaining(Sums(), anchors, 1.0, 16, torch.tensor(0.0))
    first, again, other = (held._drawn(batch_of(*sizes)).texts for sizes in ((6,), (6,), (7,)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 16


@pytest.mark.parametrize("full", [False, True])
def test_texts_that_are_retained_stay(
    full: bool, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """What the option is for: the model forgets far less of them, and of others like them."""
    drifts = {}
    for name, retain in (("free", None), ("held", Retained(TEXTS, weight=30.0))):
        clip = make_clip() if full else adapted(make_clip)
        options = {"lr": 1e-3, "lock_image": True} if full else {}
        fit(clip, pairs, tmp_path / name, retain=retain, **options)
        drifts[name] = [drift(clip, make_clip(), texts) for texts in Retained(TEXTS).parts()]
    for held, free in zip(drifts["held"], drifts["free"], strict=True):
        assert held < free / 3
        assert free > 1e-3


def test_an_image_adapter_is_held_by_the_training_images(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Without pictures of old things nothing would hold an image tower."""
    base, texts = make_clip(), encode_captions(make_clip(), TEXTS)

    def moved(clip: Clip) -> float:
        now, before = (encode_images(model, pairs.images, workers=0) @ texts.T for model in (clip, base))
        scale = base.logit_scale.exp().detach()
        return float(
            F.kl_div(*((scale * s).log_softmax(1) for s in (now, before)), log_target=True, reduction="sum")
        )

    found = {}
    for name, retain in (("free", None), ("held", Retained(TEXTS, weight=300.0))):
        clip = adapted(make_clip, "vision-linear")
        fit(clip, pairs, tmp_path / name, retain=retain)
        found[name] = moved(clip)
    assert found["held"] < found["free"] / 2


def test_the_distance_of_images_by_hand(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """The divergence would be of other images than those of the batch."""
    clip = adapted(make_clip, "vision-linear")
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = prepared(clip, pairs, batch_size=4, workers=0)
    retained = Retained(TEXTS[:25], weight=2.0)
    task = Sums()
    held = hold_to_base(task, inputs, retained, pairs.images)
    assert held.anchors.encode is None
    (batch,) = (next(inputs.feed.batches(0, 0)),)
    ids = batch[0].image_ids
    now = torch.randn(4, held.anchors.texts.shape[1])
    total = held.loss(batch)(now, torch.zeros(4, now.shape[1]))
    base, texts = make_clip(), encode_captions(make_clip(), retained.parts()[0])
    assert len(texts) == 20
    images = encode_images(base, [pairs.images[i] for i in ids], workers=0)
    drawn = held._drawn(batch).texts
    scale = base.logit_scale.exp().detach()
    wanted, given_ = scale * images @ texts[drawn].T, scale * F.normalize(now, dim=1) @ texts[drawn].T
    kl = [
        F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean")
        for a, b in ((given_, wanted), (given_.T, wanted.T))
    ]
    assert total.item() == pytest.approx(5.0 + 2.0 * _SIMILARITY * float(sum(kl)) / 2, rel=1e-4)


def test_pictures_hold_an_image_tower_by_hand(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """Other pictures would be held than are encoded, or the task would see pictures not its own."""
    clip = adapted(make_clip, "vision-linear")
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = prepared(clip, pairs, batch_size=4, workers=0)
    texts = tuple(text for _, captions in pairs for text in captions) + TEXTS
    task = Sums(clip.encode_text("a").shape[1])
    held = hold_to_base(task, inputs, Retained(texts, weight=2.0, pairs=pairs), pairs.images)
    pictures = held.anchors.pictures
    assert pictures is not None
    batch = [MicroBatch(torch.tensor([0, 2, 3]), torch.tensor([0, 5, 6]), None, torch.zeros(3).long())]
    drawn = held._drawn(batch)
    assert len(drawn.texts) == len(drawn.texts.unique()) == len(held.anchors.texts)
    assert len(drawn.pictures) == len(drawn.pictures.unique()) == len(pairs)
    parts = [encode() for encode in held.parts(batch)]
    images, of_texts = (torch.cat(tower) for tower in zip(*parts, strict=True))
    total = held.loss(batch)(images, of_texts)
    assert len(task.images) == len(task.texts) == 3
    assert bool((task.images == 1).all())
    base, held_texts = make_clip(), Retained(texts).parts()[0]
    chosen = [pairs.images[index] for index in drawn.pictures.tolist()]
    trained = [pairs.images[index] for index in (0, 2, 3)]
    wanted_images = encode_images(base, [*chosen, *trained], workers=0)
    given_images = torch.cat([encode_images(clip, chosen, workers=0), F.normalize(task.images, dim=1)])
    of_base = encode_captions(base, held_texts)[drawn.texts]
    scale = base.logit_scale.exp().detach()
    wanted, given_ = scale * wanted_images @ of_base.T, scale * given_images @ of_base.T
    kl = [
        F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean")
        for a, b in ((given_, wanted), (given_.T, wanted.T))
    ]
    assert total.item() == pytest.approx(5.0 + 2.0 * _SIMILARITY * float(sum(kl).detach()) / 2, rel=1e-3)


@pytest.mark.parametrize("targets", ["vision-linear", "vision.1.q,v"])
def test_pictures_that_are_retained_stay(
    targets: str, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Pictures beside retained texts would be read and count for nothing."""
    half = len(pairs) // 2
    old, new = pairs[:half], pairs[half:]
    texts = tuple(text for _, captions in old for text in captions) + TEXTS
    base = make_clip()
    of_texts = encode_captions(base, texts)
    moved = {}
    for name, given_ in (("free", None), ("held", Retained(texts, weight=300.0, pairs=old))):
        clip = adapted(make_clip, targets)
        fit(clip, new, tmp_path / name, retain=given_)
        now, before = (encode_images(model, old.images, workers=0) @ of_texts.T for model in (clip, base))
        moved[name] = float((now - before).abs().mean())
    assert moved["held"] < moved["free"] / 2


def test_the_base_is_the_model_without_its_adapter(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """A run that goes on from an adapter would be held to that adapter, whatever it has forgotten."""
    clip = adapted(make_clip)
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = prepared(clip, pairs, batch_size=4, workers=0)
    held = hold_to_base(Sums(), inputs, Retained(TEXTS), pairs.images)
    assert torch.allclose(
        held.anchors.texts, encode_captions(make_clip(), Retained(TEXTS).parts()[0]), atol=1e-6
    )


def test_a_resumed_run_ends_with_the_same_bits(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Texts, weight or random streams would be others after a break."""
    whole, broken = adapted(make_clip, dropout=0.1), adapted(make_clip, dropout=0.1)
    fit(whole, pairs, tmp_path / "whole", retain=Retained(TEXTS), lr_scheduler="const", warmup=0)
    fit(broken, pairs, tmp_path / "broken", retain=Retained(TEXTS), lr_scheduler="const", warmup=0, epochs=3)
    again = adapted(make_clip, dropout=0.1)
    result = fit(
        *(again, pairs, tmp_path / "broken"),
        retain=Retained(TEXTS),
        lr_scheduler="const",
        warmup=0,
        epochs=6,
        resume=True,
    )
    assert result.weight is not None
    left, right = (cg.adapters.lora_state_dict(clip) for clip in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(CheckpointError, match="retained"):
        fit(adapted(make_clip), pairs, tmp_path / "broken", retain=Retained(TEXTS[:30]), resume=True)


def test_the_weight_is_found_and_recorded(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`auto` would be a constant, or leave the model changed by its trials."""
    found, given_ = adapted(make_clip), adapted(make_clip)
    result = fit(found, pairs, tmp_path / "auto", retain=Retained(TEXTS), epochs=60)
    assert result.weight is not None
    assert result.weight.why is None
    assert [trial.weight for trial in result.weight.trials] == list(WEIGHTS)
    assert result.weight.cost <= retention.SHARE
    record = json.loads((tmp_path / "auto" / retention.RECORD).read_text())
    assert record["weight"] == result.weight.weight
    assert json.loads((tmp_path / "auto" / "results.json").read_text())["weight"] == record
    fit(given_, pairs, tmp_path / "given", retain=Retained(TEXTS, weight=result.weight.weight), epochs=60)
    left, right = (cg.adapters.lora_state_dict(clip) for clip in (found, given_))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_short_run_takes_a_stated_weight(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody would know that nothing was tried."""
    result = fit(adapted(make_clip), pairs, tmp_path / "run", retain=Retained(TEXTS), epochs=1)
    assert result.weight is not None
    assert result.weight.weight == WEIGHT
    assert (
        f"`retain_weight=auto` takes {WEIGHT:g}, untried: 5% of the run's 6 steps are too few" in caplog.text
    )


@given(
    before=st.floats(0.1, 10),
    losses=st.lists(st.one_of(st.none(), st.floats(0, 10)), min_size=len(WEIGHTS), max_size=len(WEIGHTS)),
)
def test_the_largest_weight_that_hardly_slows_learning(before: float, losses: list[float | None]) -> None:
    """A weight that stops learning would be chosen, or one that retains less than it could."""
    trials = [WeightTrial(weight, loss) for weight, loss in zip(WEIGHTS, losses, strict=True)]
    chosen = largest_harmless(before, trials)
    finite = {trial.weight: trial.loss for trial in trials if trial.loss is not None}
    if not finite:
        assert chosen == WEIGHT
        return
    best = min(finite.values())
    assert finite[chosen] <= best + 0.05 * max(0.0, before - best)
    assert all(loss > finite[chosen] for weight, loss in finite.items() if weight > chosen)


def test_too_few_texts_are_refused() -> None:
    """A model would be held to a word or two, and its owner believe that nothing is forgotten."""
    assert len(Retained(TEXTS[:FEWEST]).texts) == FEWEST
    with pytest.raises(DataError, match=f"notes.txt: 2 different texts are too few .* give {FEWEST} or more"):
        Retained(("a", "a", "b", " "), "notes.txt")


def test_texts_are_split_by_what_they_say() -> None:
    """What is measured would have been trained on, or change with the order of the texts."""
    held, measured = Retained(TEXTS).parts()
    assert sorted([*held, *measured]) == sorted(TEXTS)
    assert len(measured) == len(TEXTS) // 5
    assert set(Retained(TEXTS[::-1]).parts()[1]) == set(measured)


def test_bases_have_texts_of_their_own(clip: Clip) -> None:
    """The embedded base would be held to words that it never saw, and others to emoji."""
    general, emoji = retained_texts(clip), retained_texts(cg.load("emoji"))
    assert "a photo of a dog" in {text.replace("a close-up photo", "a photo") for text in general.texts}
    assert emoji.texts != general.texts
    assert len(general.texts) == 2_000
    assert retained_texts(clip) == general


def test_nothing_that_trains_is_refused(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A head alone changes nothing of the model, and the option would promise something."""
    data = cg.data.Labelled(pairs.images, tuple(i % 2 for i in range(len(pairs))), ("one", "two"))
    options = groups(
        out=tmp_path / "run",
        prompts=(("one",), ("two",)),
        head="linear",
        lock_image=True,
        lock_text=True,
        **QUICK,
    )
    with pytest.raises(ConfigError, match="`retain` given, but nothing of the model trains"):
        cg.fit_classifier(clip, data, retain=Retained(TEXTS), **options)
