"""The strength of what was learnt: what it does to a model, what is measured, and what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clipgraft as cg
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.retained import Retained
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import Clip
from clipgraft.train.strength import (
    STRENGTHS,
    AdapterDial,
    Beginning,
    Point,
    WeightsDial,
    make_dial,
    recommend,
)
from fitting import groups

MakeClip = Callable[[], Clip]
TEXTS = tuple(f"an old word number {number}" for number in range(60))
TARGETS = "text.*.q,v,fc1,vision.*.k,out,fc2"
QUICK: dict[str, Any] = {"batch_size": 4, "epochs": 2, "lr": 1e-2, "workers": 0, "progress": False}


def trained(make_clip: MakeClip, **options: Any) -> Clip:
    """A tiny base with an adapter whose every weight is random."""
    clip = make_clip()
    torch.manual_seed(0)
    if options.get("variant") != "vera":
        options = {"alpha": 8, **options}
    cg.apply_lora(clip, **{"r": 4, "targets": TARGETS, **options})
    for parameter in require_lora(clip).chosen().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return clip.eval()


def features(clip: Clip, pairs: cg.Pairs) -> Tensor:
    texts = [caption for captions in pairs.captions for caption in captions]
    return torch.cat([encode_captions(clip, texts), encode_images(clip, pairs.images, workers=0)])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"variant": "vera"}, {"bias": "all"}])
@pytest.mark.parametrize("strength", [0.25, 1.5])
def test_a_strength_scales_the_change_of_every_weight(
    options: dict[str, Any], strength: float, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """What is measured, or saved, would be another model than W + strength · (W' - W)."""
    wanted = trained(make_clip, **options)
    base, merged = make_clip(), copy.deepcopy(wanted.model)
    cg.merge_lora(merged)
    explicit = make_clip()
    with torch.no_grad():
        ours = dict(merged.named_parameters())
        for name, parameter in explicit.model.named_parameters():
            start = base.model.get_parameter(name)
            parameter.copy_(start + strength * (ours[name] - start))
    dial = make_dial(wanted, None)
    assert isinstance(dial, AdapterDial)
    before = features(wanted, pairs)
    dial.turn(strength)
    torch.testing.assert_close(features(wanted, pairs), features(explicit, pairs), rtol=0, atol=2e-5)
    dial.turn(0.0)
    torch.testing.assert_close(features(wanted, pairs), features(base, pairs), rtol=0, atol=1e-6)
    dial.turn(1.0)
    assert torch.equal(features(wanted, pairs), before)
    dial.keep(strength)
    cg.save_adapter(wanted, tmp_path / "saved")
    loaded = make_clip()
    cg.load_adapter(loaded, tmp_path / "saved")
    torch.testing.assert_close(features(loaded, pairs), features(explicit, pairs), rtol=0, atol=2e-5)


def test_alpha_says_the_strength(make_clip: MakeClip, tmp_path: Path) -> None:
    """PEFT and open_clip would load the adapter as trained, since alpha is all that they know of it."""
    clip = trained(make_clip, alpha_pattern={"text.0.q": 12})
    dial = make_dial(clip, None)
    assert isinstance(dial, AdapterDial)
    dial.keep(0.5)
    cg.save_adapter(clip, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 4
    assert set(config["alpha_pattern"].values()) == {6}


def test_weights_are_interpolated(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """Full fine-tuning would be compared with an adapter at another strength (WiSE-FT, eq. 1)."""
    clip = make_clip()
    begun = Beginning(clip.model)
    start = {name: p.detach().clone() for name, p in clip.model.named_parameters()}
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    end = {name: p.detach().clone() for name, p in clip.model.named_parameters()}
    dial = make_dial(clip, begun)
    assert isinstance(dial, WeightsDial)
    dial.turn(0.25)
    for name, parameter in clip.model.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * start[name] + 0.25 * end[name])
    dial.turn(1.0)
    assert all(torch.equal(p, end[name]) for name, p in clip.model.named_parameters())


def test_dora_has_no_strength(make_clip: MakeClip) -> None:
    """Its magnitudes do not scale with alpha: a curve would be of models that nobody can save."""
    assert "magnitudes" in str(make_dial(trained(make_clip, variant="dora"), None))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=len(STRENGTHS), max_size=len(STRENGTHS))
)
def test_the_recommended_one_keeps_most_of_the_good_ones(found: list[tuple[float, float]]) -> None:
    """A strength that gains nothing, or keeps less than it could, would be recommended."""
    points = [Point(s, gained, kept) for s, (gained, kept) in zip(STRENGTHS, found, strict=True)]
    chosen = next(point for point in points if point.strength == recommend(points))
    above = [point for point in points if point.strength > 0]
    best = max(point.gained for point in above)
    assert chosen in above
    assert chosen.gained >= best - 0.01
    assert all(point.kept <= chosen.kept for point in above if point.gained >= best - 0.01)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_tells_what_it_gained_and_kept(
    full: bool, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its numbers would not be those of the models that it names."""
    clip = make_clip()
    if not full:
        cg.apply_lora(clip, r=4, targets="text-linear")
    retain = Retained(TEXTS, "my texts", weight=1.0)
    result = cg.fit(
        clip,
        pairs,
        pairs,
        **groups(out=tmp_path / "run", retain=retain, **QUICK | {"lr": 1e-3 if full else 1e-2}),
    )
    curve = result.strength
    assert curve is not None
    assert [point.strength for point in curve.points] == list(STRENGTHS)
    names = ("image_to_text_R@1", "text_to_image_R@1")
    assert result.base is not None
    for strength, metrics in ((0.0, result.base), (1.0, result.metrics)):
        assert curve.at(strength).gained == pytest.approx(sum(metrics[name] for name in names) / 2)
    found = cg.evaluate_retrieval(clip, pairs, workers=0)
    assert curve.at(1.0).gained == pytest.approx(sum(found[name] for name in names) / 2)
    texts = encode_captions(clip, retain.parts()[1]), encode_captions(make_clip(), retain.parts()[1])
    images = [encode_images(model, pairs.images, workers=0) for model in (clip, make_clip())]
    scores = [image @ text.T for image, text in zip(images, texts, strict=True)]
    same = [(scores[0].argmax(d) == scores[1].argmax(d)).float().mean().item() for d in (0, 1)]
    assert curve.at(1.0).kept == pytest.approx(sum(same) / 2)
    assert curve.at(0.0).kept == 1.0
    assert (curve.of, curve.applied, curve.texts) == ("weights" if full else "alpha", False, 12)
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())["strength"]
    assert recorded == json.loads(json.dumps(curve.to_dict()))
    assert "12 texts (my texts)" in caplog.text


@pytest.mark.parametrize("full", [False, True])
def test_auto_saves_the_recommended_strength(
    full: bool, make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a run would be of a model that it did not save."""
    monkeypatch.setattr("clipgraft.train.strength.recommend", lambda points: 0.5)
    clip = make_clip()
    if not full:
        cg.apply_lora(clip, r=4, targets="text-linear")
    options = QUICK | {"lr": 1e-3 if full else 1e-2, "strength": "auto", "out": tmp_path / "run"}
    result = cg.fit(clip, pairs, pairs, **groups(**options))
    assert result.strength is not None
    assert result.strength.applied
    loaded = cg.load(str(tmp_path / "run")) if full else make_clip()
    if not full:
        cg.load_adapter(loaded, result.saved)
    found = cg.evaluate_retrieval(loaded, pairs, workers=0)
    assert {name: result.metrics[name] for name in found} == pytest.approx(found)
    assert result.verdict is not None
    assert result.verdict.after["text_to_image_R@1"] == pytest.approx(found["text_to_image_R@1"])
    assert {name: result.strength.metrics[name] for name in found} == pytest.approx(found)


def test_a_sweep_changes_no_bit_of_the_run(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Looking at other strengths would change what is saved."""
    states = []
    for choice in ("sweep", "none"):
        clip = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(clip, r=4, dropout=0.2, targets="linear", bias="all")
        result = cg.fit(clip, pairs, pairs, **groups(out=tmp_path / choice, strength=choice, **QUICK))
        assert (result.strength is None) == (choice == "none")
        states.append({n: t.clone() for n, t in cg.adapters.lora_state_dict(clip).items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_much_that_is_forgotten_comes_with_advice_that_helps(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A run would say that it forgot a lot, and not what to do; or what to do would not help."""
    retained = Retained(TEXTS, "my texts", weight=30.0)
    kept = {}
    for name, retain in (("free", None), ("held", retained)):
        clip = make_clip()
        torch.manual_seed(0)
        cg.apply_lora(clip, r=8, targets="text-linear")
        options = QUICK | {"epochs": 6, "lr": 3e-2}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clipgraft.train.run.retained_texts", lambda clip: retained)
            result = cg.fit(clip, pairs, pairs, **groups(out=tmp_path / name, retain=retain, **options))
        assert result.strength is not None
        kept[name] = result.strength
    assert kept["free"].at(1.0).kept < 0.9
    assert "try `retain=auto`" in str(kept["free"])
    assert "try `retain=auto`" not in str(kept["held"])
    assert kept["held"].at(1.0).kept > kept["free"].at(1.0).kept
