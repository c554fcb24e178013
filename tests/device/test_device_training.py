"""Every way to train, on the stand-in device: it learns what the CPU learns, and no step waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from clipgraft.data.datasets import Labelled
from clipgraft.data.retained import Retained
from clipgraft.models.clip import Clip
from clipgraft.train import rate, retention
from clipgraft.train.fit import distill, fit_classifier
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.loop import Loop
from fitting import groups
from run_comparison import dies_at, differences, events, run_contents
from standin_device import Wait, recorded_waits
from tiny_siglip import siglip_clip, with_logit_bias

MakeClip = Callable[[], Clip]
QUICK: dict[str, Any] = {
    **{"batch_size": 8, "epochs": 1, "lr": 1e-2, "workers": 0, "progress": False},
    **{"strength": "none", "autocast": False},
}
TEXTS = tuple(f"an old word number {number}" for number in range(60))


@dataclass(frozen=True)
class Case:
    """One way to train: sites of the adapter (None for none), options, and what else makes it."""

    targets: str | None = "linear-text"
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    base: Callable[[MakeClip], Clip] = lambda make: make()
    recipe: str = "pairs"

    def clip(self, make: MakeClip, device: torch.device | str = "cpu") -> Clip:
        clip = self.base(make).to(device)
        torch.manual_seed(0)
        if self.targets is not None:
            cg.apply_lora(clip, **{"r": 4, "dropout": 0.0, "targets": self.targets, **self.lora})
        return clip

    def run(self, clip: Clip, make: MakeClip, pairs: cg.Pairs, out: Path) -> list[float]:
        """Train; the loss of every step."""
        given = {**QUICK, "out": out, **self.options}
        if self.recipe == "pairs":
            cg.fit(clip, pairs, pairs, **groups(**given))
        elif self.recipe == "retained":
            held = Retained(TEXTS, weight=3.0, pairs=pairs[:4])
            cg.fit(clip, pairs, pairs, **groups(retain=held, **given))
        elif self.recipe == "distilled":
            distill(clip, make().to(clip.device), pairs, pairs, **groups(**given))
        else:
            data = Labelled(pairs.images, tuple(n % 3 for n in range(len(pairs))), ("a", "b", "c"))
            prompts = (("a", "an a"), ("b",), ("c", "some c"))
            options = {
                **given,
                "batch_size": given["batch_size"] // 2,
                "head": self.recipe,
                "weights": (1.0, 2.0, 3.0),
            }
            fit_classifier(clip, data, data, **groups(prompts=prompts, **options))
        return [event["loss"] for event in events(out) if event["kind"] == "train"]


CACHED = {"accum_freq": 2, "batch_size": 4}
CASES = {
    "gallery of images": Case(),
    "gallery of texts": Case("linear-vision"),
    "gallery, cached gradients": Case(options=CACHED),
    "batch negatives": Case(options={"negatives": "batch"}),
    "augmented": Case(options={"augment": True}),
    "augmented views": Case(options={"augment": True, "cache_views": 2}),
    "upper image blocks": Case("vision.1.*"),
    "both towers": Case("linear", {"grad_clip_norm": 0.5}),
    "both towers, cached gradients": Case("linear", CACHED),
    "both towers, recomputed": Case("linear", {"grad_checkpointing": True}),
    "tables and convolution": Case("all", {"lora_plus_ratio": 4.0}),
    "dora": Case("text-attention", lora={"use_dora": True}),
    "biases, norms, temperature": Case("text.*.q,v,fc1", lora={"bias": "all", "train_logit_scale": True}),
    "vera": Case("text-attention", lora={"variant": "vera"}),
    "from the base's weights": Case("attention", lora={"init": "pissa"}),
    "from the data": Case("attention", lora={"init": "eva"}),
    "whole model": Case(None, {"lr": 1e-4}),
    "locked": Case(None, {"lr": 1e-4, "lock_image": True, "lock_text": True, "lock_text_unlocked_layers": 2}),
    "sigmoid, open_clip": Case("linear", base=lambda make: with_logit_bias(make())),
    "sigmoid, gallery": Case(base=lambda make: with_logit_bias(make())),
    "sigmoid, transformers": Case("text.*.q,v", CACHED, base=lambda make: siglip_clip()),
    "retained": Case("linear", recipe="retained"),
    "retained by a frozen image tower": Case(recipe="retained"),
    "distilled": Case("linear", recipe="distilled"),
    "classes by prompts": Case("linear", recipe="prompts"),
    "classes by a linear head": Case("vision.1.*", recipe="linear"),
    "classes by a cosine head": Case("linear-vision", CACHED, recipe="cosine"),
}


@contextmanager
def step_waits() -> Iterator[list[Wait]]:
    """Gives the list of what steps waited for since; the first of a run may check what it will do."""
    found: list[Wait] = []
    step = Loop.step

    def recorded(self: Loop, batch: Any, number: int) -> Any:
        with recorded_waits() as waits:
            result = step(self, batch, number)
        found.extend(waits if number > 1 else ())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", recorded)
        yield found


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_cpus_and_its_steps_wait_for_nothing(
    name: str, make_clip: MakeClip, pairs: cg.Pairs, device: torch.device, tmp_path: Path
) -> None:
    """Training on a GPU fails, learns something else than on the CPU, or is slow for reading back."""
    case = CASES[name]
    on_cpu, on_device = case.clip(make_clip), case.clip(make_clip, device)
    wanted = case.run(on_cpu, make_clip, pairs, tmp_path / "cpu")
    with step_waits() as waits:
        got = case.run(on_device, make_clip, pairs, tmp_path / "device")
    assert got == pytest.approx(wanted, rel=1e-5)
    assert len(got) >= 3
    assert waits == []
    assert on_device.device == device
    with torch.no_grad():
        for given in (pairs.captions[0], pairs.images[:2]):
            ours, theirs = (
                clip.encode_text(given) if isinstance(given[0], str) else clip.encode_image(given)
                for clip in (on_device, on_cpu)
            )
            assert torch.allclose(ours.cpu(), theirs, atol=1e-4)


def test_an_epoch_is_read_once(
    make_clip: MakeClip,
    pairs: cg.Pairs,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses are read back from a GPU at each step, between steps: for a bar, a log or an event."""
    found: list[Wait] = []
    epoch = Loop._epoch

    def recorded(self: Loop, *given: Any) -> Any:
        with recorded_waits() as waits:
            position = epoch(self, *given)
        found.extend(waits)
        return position

    monkeypatch.setattr(Loop, "_epoch", recorded)
    case = Case("linear")
    case.run(case.clip(make_clip, device), make_clip, pairs, tmp_path / "run")
    once = ("lora/state.py:verify_gradients", "train/checkpoint.py:save_checkpoint")
    assert [wait for wait in found if wait.place not in once] == [Wait("to host", "train/loop.py:read")]


def test_bf16_is_close(make_clip: MakeClip, pairs: cg.Pairs, device: torch.device, tmp_path: Path) -> None:
    """`--precision amp_bf16` on a GPU computes in other types than its autocast allows."""
    exact, fast = Case("linear"), Case("linear", {"autocast": True})
    wanted = exact.run(exact.clip(make_clip), make_clip, pairs, tmp_path / "exact")
    with step_waits() as waits:
        got = fast.run(fast.clip(make_clip, device), make_clip, pairs, tmp_path / "fast")
    assert got != wanted
    assert got == pytest.approx(wanted, rel=0.03)
    assert waits == []


def test_dropout_is_replayed(device: torch.device) -> None:
    """With `accum_freq` and dropout a GPU's gradients are of another mask than the loss: of no function."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4).to(device).requires_grad_()
    seen: list[Tensor] = []

    def encode(row: int) -> tuple[Tensor, Tensor]:
        features = F.dropout(weight[row : row + 2], 0.5)
        seen.append(features.detach().cpu())
        return features, features

    parts = [lambda row=row: encode(row) for row in (0, 2)]
    contrastive_backward(parts, lambda images, texts: (images * texts).sum())
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert weight.grad is not None
    kept = torch.cat(seen[:2]) / weight.detach().cpu()
    assert torch.allclose(weight.grad.cpu(), 2 * kept * torch.cat(seen[:2]), atol=1e-6)


@pytest.mark.parametrize("targets", ["linear-text", "linear", None])
def test_a_resumed_run_ends_with_the_same_bits(
    targets: str | None, make_clip: MakeClip, pairs: cg.Pairs, device: torch.device, tmp_path: Path
) -> None:
    """A run on a GPU that was preempted ends elsewhere: with another dropout, or other moments."""
    case = Case(
        targets, {"epochs": 2, "checkpoint_steps": 2, "lr": 1e-3}, {} if targets is None else {"dropout": 0.2}
    )

    def run(out: str, **options: Any) -> None:
        clip = case.clip(make_clip, device)
        given = {**QUICK, **case.options, "out": tmp_path / out, **options}
        cg.fit(clip, pairs, pairs, **groups(**given))

    run("whole")
    with dies_at(Loop, "step", 6, before=True):
        run("again")
    torch.randn(3, device=device)
    run("again", resume=True)
    assert events(tmp_path / "again") == events(tmp_path / "whole")
    assert differences(run_contents(tmp_path / "again"), run_contents(tmp_path / "whole")) == []


def test_what_a_run_is_not_told_is_found(
    make_clip: MakeClip,
    pairs: cg.Pairs,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`lr=auto`, `retain_weight=auto` or the sweep over strengths fail on a GPU, or find something else."""
    for module, share in ((rate, 6.0), (retention, 3.0)):  # of so short a run the trials are most
        monkeypatch.setattr(module, "SHARE", share)
        monkeypatch.setattr(module, "FEWEST_STEPS", 1)
    options = {**QUICK, "lr": "auto", "strength": "auto", "batch_size": 4, "epochs": 2}
    held = Retained(TEXTS, weight="auto")
    found = []
    for name in ("cpu", device):
        clip = Case().clip(make_clip, name)
        result = cg.fit(clip, pairs, pairs, **groups(out=tmp_path / str(len(found)), retain=held, **options))
        found.append(result)
    for result in found:
        assert result.rate is not None
        assert len(result.rate.trials) > 4
        assert result.weight is not None
        assert len(result.weight.trials) > 1
    ours, theirs = ([trial.loss for trial in result.rate.trials] for result in found)
    assert ours == pytest.approx(theirs, rel=1e-4)
