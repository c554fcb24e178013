"""Runs with the sigmoid loss: both families, adapters and whole models, and what else a run can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.folder import NATIVE_FILE
from clipgraft.data.retained import Retained
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.feed import Feed, LiveImages, LiveTexts
from clipgraft.train.fit import distill, fit_classifier
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.recipes.contrastive import Contrastive
from clipgraft.train.recipes.pair_losses import make_pair_loss
from clipgraft.train.run_folder import RunFolder
from fitting import groups
from run_comparison import dies_at, differences, events, run_contents
from tiny_siglip import BIAS, SCALE, siglip_clip, with_logit_bias

MakeClip = Callable[[], Clip]
QUICK: dict[str, Any] = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "workers": 0, "progress": False}
BOTH = "text.*.q,v,fc1,vision.*.q,v,fc1"


@pytest.fixture(params=["open_clip", "transformers"])
def make_siglip(request: pytest.FixtureRequest, make_clip: MakeClip) -> MakeClip:
    """A fresh tiny model with a `logit_bias` a call, of either family."""
    return siglip_clip if request.param == "transformers" else lambda: with_logit_bias(make_clip())


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> cg.train.FitResult:
    return cg.fit(clip, pairs, **groups(out=out, **{**QUICK, **options}))


def adapted(clip: Clip, targets: str = "text-attention", **options: Any) -> Clip:
    torch.manual_seed(0)
    cg.apply_lora(clip, **{"r": 2, "targets": targets, "train_logit_scale": True, **options})
    return clip


def logits_of(clip: Clip) -> tuple[float, float]:
    assert clip.logit_bias is not None
    return clip.logit_scale.item(), clip.logit_bias.item()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "adapter"])
def test_a_run_trains_and_resumes_to_the_same_bits(
    whole: bool, make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A SigLIP could not be tuned, or a preempted run would give another model."""

    def run(out: Path, resume: bool = False) -> Clip:
        clip = make_siglip()
        if not whole:
            adapted(clip, BOTH, dropout=0.3)
        fit(clip, pairs, out, resume=resume, epochs=4, accum_freq=2, batch_size=4, lr=3e-3)
        return clip

    clip = run(tmp_path / "whole")
    steps = events(tmp_path / "whole")
    assert sum(line["loss"] for line in steps[-3:]) < sum(line["loss"] for line in steps[:3])
    scale, bias = logits_of(clip)
    assert scale != SCALE
    assert bias != BIAS
    assert steps[-1]["logit_bias"] == pytest.approx(bias)
    with dies_at(RunFolder, "event", 6, before=False):
        run(tmp_path / "killed")
    run(tmp_path / "killed", resume=True)
    assert differences(run_contents(tmp_path / "killed"), run_contents(tmp_path / "whole")) == []
    assert events(tmp_path / "killed") == events(tmp_path / "whole")
    assert recorded_settings(tmp_path / "whole" / "checkpoints" / "latest.pt")["loss"] == "sigmoid"


def test_accumulation_equals_one_big_batch(make_siglip: MakeClip, pairs: cg.Pairs) -> None:
    """`--accum-freq 4 --batch-size 6` would train something else than `--batch-size 24`."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for batch_size, accum_freq in ((24, 1), (6, 4)):
        clip = adapted(make_siglip(), BOTH).train()
        for name, parameter in clip.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        clip.model.double()
        encoder = Encoder(clip)
        feed = Feed(pairs, batch_size, accum_freq, 0, clip.require_preprocess(), 0)
        batch = next(feed.batches(0, 0))
        texts = LiveTexts(encoder, feed.captions)
        objective = Contrastive(clip, LiveImages(encoder), texts, make_pair_loss(clip, "sigmoid"))
        loss = contrastive_backward(objective.parts(batch), objective.loss(batch))
        assert cg.lora.verify_gradients(clip) == len(list(_trained(clip)))
        found.append((loss, {n: p.grad for n, p in clip.model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert found[0][1].keys() == found[1][1].keys() >= {"logit_scale", "logit_bias"}
    for name, gradient in found[0][1].items():
        error = (found[1][1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-6, f"{name}: {error:.1e}"


def _trained(clip: Clip) -> list[nn.Parameter]:
    return [p for p in clip.model.parameters() if p.requires_grad and p.numel()]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "adapter"])
def test_a_softmax_leaves_the_bias_alone(
    whole: bool, make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A parameter without a gradient would end the run, or the optimizer would move it all the same."""
    clip = make_siglip() if whole else adapted(make_siglip())
    fit(clip, pairs, tmp_path / "run", loss="softmax", grad_clip_norm=1.0)
    assert logits_of(clip)[1] == BIAS
    assert logits_of(clip)[0] != SCALE
    assert "logit_bias" not in events(tmp_path / "run")[0]
    again = make_siglip() if whole else adapted(make_siglip())
    fit(
        again,
        pairs,
        tmp_path / "run",
        loss="softmax",
        grad_clip_norm=1.0,
        resume=True,
        epochs=3,
        epoch_parts=(2, 1),
    )
    other = make_siglip() if whole else adapted(make_siglip())
    with pytest.raises(cg.errors.CheckpointError, match=r"loss \(was 'softmax', now 'sigmoid'\)"):
        fit(other, pairs, tmp_path / "run", grad_clip_norm=1.0, resume=True, epochs=3, epoch_parts=(2, 1))


@pytest.mark.parametrize(("loss", "wanted"), [("softmax", 4.6052), ("sigmoid", 4.7215)])
def test_a_temperature_above_clips_limit(
    loss: str, wanted: float, make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A published SigLIP, whose scale is 112, would be another model after the first step."""
    clip = make_siglip()
    with torch.no_grad():
        clip.logit_scale.fill_(4.7215)
    fit(clip, pairs, tmp_path / "run", loss=loss, lr=1e-6, epochs=1)
    assert clip.logit_scale.item() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("targets", ["text-attention", "vision.*.fc1"])
def test_the_gallery_is_the_default_where_a_tower_is_frozen(
    targets: str, make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """The better negatives would be those of the softmax alone."""
    first = {}
    for negatives in (None, "gallery", "batch"):
        fit(adapted(make_siglip(), targets), pairs, tmp_path / str(negatives), negatives=negatives, epochs=1)
        first[negatives] = events(tmp_path / str(negatives))[0]["loss"]
    assert first[None] == first["gallery"]
    assert first["gallery"] != first["batch"]
    assert first["gallery"] == pytest.approx(first["batch"], rel=0.3), "one size, whatever the gallery's"


def test_an_adapter_without_a_temperature_keeps_the_bases(
    make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """The bias would move and be in no file, so that a loaded adapter gives other probabilities."""
    clip = adapted(make_siglip(), train_logit_scale=False)
    fit(clip, pairs, tmp_path / "run")
    assert logits_of(clip) == (SCALE, BIAS)
    record = json.loads((tmp_path / "run" / "adapter" / NATIVE_FILE).read_text())
    assert record["logit_scale"] is None
    assert "logit_bias" not in record


def test_what_a_run_saved_has_its_bias(make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Whoever loads the adapter gets other probabilities than the run had."""
    clip = adapted(make_siglip())
    fit(clip, pairs, tmp_path / "run")
    other = make_siglip()
    cg.load_adapter(other, tmp_path / "run")
    assert logits_of(other) == pytest.approx(logits_of(clip), rel=1e-7)
    cg.lora.disable_lora(other)
    assert logits_of(other) == (SCALE, BIAS)


def test_a_run_that_is_held_to_its_base(make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """What is retained would be compared at a temperature that the loss does not have, or not at all."""
    texts = Retained(tuple(f"a text number {number} to keep" for number in range(40)), weight=2.0)
    clip = adapted(make_siglip(), BOTH)
    fit(clip, pairs, tmp_path / "run", retain=texts, accum_freq=2, batch_size=4)
    assert logits_of(clip)[1] != BIAS


def test_trials_choose_a_rate(make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--lr auto`, the default, would fail for a SigLIP, or leave the bias where a trial moved it."""
    before: list[tuple[float, float]] = []
    clip = adapted(make_siglip())
    with pytest.MonkeyPatch.context() as patch:
        real = cg.train.loop.Loop.run

        def noting(self: Any, *args: Any, **options: Any) -> None:
            before.append(logits_of(self.clip))
            real(self, *args, **options)

        patch.setattr(cg.train.loop.Loop, "run", noting)
        result = fit(clip, pairs, tmp_path / "run", lr="auto", epochs=60, batch_size=2)
    assert result.rate is not None
    assert result.rate.trials
    assert before == [(SCALE, BIAS)]


@pytest.mark.parametrize("contrastive", [0.0, 1.0])
def test_distillation(contrastive: float, make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A SigLIP could be no student, or a bias that no term depends on would end the run."""
    clip = adapted(make_siglip(), BOTH)
    options = {**QUICK, "contrastive": contrastive, "out": tmp_path / "run"}
    distill(clip, make_siglip(), pairs, **groups(**options))
    assert (logits_of(clip)[1] != BIAS) == bool(contrastive)


def test_classes_are_learnt_by_cross_entropy(make_siglip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Classes exclude each other; a loss that judges each by itself must be refused, not ignored."""
    data = cg.data.Labelled(
        pairs.images, tuple(index % 3 for index in range(len(pairs.images))), ("a", "b", "c")
    )
    options = {"prompts": (("a",), ("b",), ("c",)), **QUICK, "batch_size": 4}
    clip = adapted(make_siglip())
    fit_classifier(clip, data, data, **groups(out=tmp_path / "run", **options))
    assert logits_of(clip)[1] == BIAS
    with pytest.raises(cg.errors.ConfigError, match="`loss=sigmoid` is for pairs"):
        fit_classifier(clip, data, **groups(out=tmp_path / "other", loss="sigmoid", **options))


def test_a_run_of_before_this_option_goes_on(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A run that was begun by an older version could not be resumed."""
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    torch.manual_seed(0)
    cg.apply_lora(clip, r=2)
    fit(clip, pairs, tmp_path / "run", epochs=1)
    state = torch.load(latest, weights_only=True)
    assert state["settings"].pop("loss") == "softmax"
    torch.save(state, latest)
    fit(clip, pairs, tmp_path / "run", resume=True, epochs=2, epoch_parts=(1, 1))
