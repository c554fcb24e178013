"""`fit` as a user calls it: what it trains, what it leaves behind, and how it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from clipgraft.train.feed import trains
from clipgraft.train.fit import FitResult
from fitting import groups, prepared

MakeClip = Callable[[], Clip]


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> FitResult:
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "lr": 1e-2, "workers": 0, "progress": False}
    return cg.fit(clip, pairs, pairs, **groups(out=out, **{**settings, **options}))


def train_events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in train_events(run)]


def weights(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in clip.model.state_dict().items()}


def test_an_adapter_learns_and_the_base_stays(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """The base is promised to be untouched; the adapter is promised to learn."""
    before = weights(clip)
    cg.apply_lora(clip, r=4, dropout=0.0, targets="text-linear,text.proj")
    result = fit(clip, pairs, tmp_path / "run", epochs=20, val_frequency=0, save_frequency=0)
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    assert all(
        torch.equal(weights(clip)[name], tensor) for name, tensor in before.items() if name in weights(clip)
    )
    assert result.saved == tmp_path / "run" / "adapter"
    assert len(result.history) == 1


def test_a_saved_adapter_gives_the_trained_features(
    make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """What is written must be what was measured."""
    trained = make_clip()
    cg.apply_lora(trained, r=4, dropout=0.2)
    result = fit(trained, pairs, tmp_path / "run")
    fresh = make_clip()
    cg.load_adapter(fresh, result.saved)
    words = ["a picture of thing number 3", "the same words"]
    assert torch.equal(fresh.encode_text(words), trained.encode_text(words))
    assert cg.read_adapter(result.saved).metrics == result.metrics


def test_full_fine_tuning_trains_everything(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, tiny_config: Path
) -> None:
    """The same call without LoRA must train the model, and save it where open_clip can read it."""
    before = weights(clip)
    result = fit(clip, pairs, tmp_path / "run", lr=1e-3)
    assert all(not torch.equal(weights(clip)[name], tensor) for name, tensor in before.items())
    again = load(str(tiny_config), str(result.saved))
    assert all(torch.equal(tensor, weights(clip)[name]) for name, tensor in again.model.state_dict().items())


def test_full_fine_tuning_of_a_transformers_base(hf_clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A fine-tuned transformers model must come back as a folder that transformers opens."""
    result = fit(hf_clip, pairs, tmp_path / "run", lr=1e-3, epochs=1, lock_image=True)
    again = load(str(result.saved))
    assert all(
        torch.equal(tensor, weights(hf_clip)[name]) for name, tensor in again.model.state_dict().items()
    )


@pytest.mark.parametrize("targets", ["text-attention", "linear+embedding", "vision.position_embedding"])
def test_lora_on_a_transformers_base(targets: str, hf_clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A user of `hf:` models gets the same training as one of open_clip's."""
    cg.apply_lora(hf_clip, r=2, targets=targets)
    assert fit(hf_clip, pairs, tmp_path / "run").saved.is_dir()


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize(
    "role", ["position_embedding", "proj", "0.q", "1.fc2", "token_embedding", "patch_embedding"]
)
def test_every_kind_of_site_trains_alone(
    tower: str, role: str, clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A tower whose only site is an embedding would be taken for frozen, and nothing would train."""
    if f"{tower}.{role}" not in map(str, clip.sites):
        return
    cg.apply_lora(clip, r=2, targets=f"{tower}.{role}")
    assert [trains(clip, "text"), trains(clip, "vision")] == [tower == "text", tower == "vision"]
    before = {name: tensor.clone() for name, tensor in cg.adapters.lora_state_dict(clip).items()}
    fit(clip, pairs, tmp_path / "run", epochs=1)
    after = cg.adapters.lora_state_dict(clip)
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_does_not_move(lock: str, clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--lock-image` that trains the image tower would spoil it, and features encoded once would be wrong."""
    before = weights(clip)
    fit(
        clip, pairs, tmp_path / "run", epochs=1, lr=1e-3, lock_image=lock == "image", lock_text=lock == "text"
    )
    moved = {name for name, tensor in weights(clip).items() if not torch.equal(tensor, before[name])}
    towers = {name.startswith("visual.") for name in moved - {"logit_scale"}}
    assert towers == {lock == "text"}


def test_a_frozen_tower_is_encoded_once(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen ViT would run again in every epoch: most of the training time for nothing."""
    cg.apply_lora(clip, r=2)
    seen: list[int] = []
    encode = Encoder.encode_image

    def counted(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_image", counted)
    fit(clip, pairs, tmp_path / "run", epochs=3)
    assert sum(seen) == 2 * len(pairs), "training and validation images, once each"


def test_both_towers_locked_is_an_error(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """The run would train the temperature alone, for hours."""
    with pytest.raises(cg.errors.ConfigError, match="nothing to train: both towers are frozen"):
        fit(clip, pairs, tmp_path / "run", lock_image=True, lock_text=True)


def test_a_failed_start_does_not_take_the_name(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """After a corrected flag the same --name must work."""
    cg.apply_lora(clip, r=2)
    with pytest.raises(cg.errors.DataError, match="do not fill one batch"):
        fit(clip, pairs, tmp_path / "run", batch_size=100)
    assert fit(clip, pairs, tmp_path / "run").history


def test_nan_loss_names_step_and_cause(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A run that diverged would go on for hours and save an adapter of NaN."""
    cg.apply_lora(clip, r=2, targets="linear")
    with pytest.raises(
        cg.errors.TrainingError, match=r"loss is nan at step 2: likely the learning rate \(1e\+30\)"
    ):
        fit(clip, pairs, tmp_path / "run", lr=1e30, lr_scheduler="const")
    assert not (tmp_path / "run" / "adapter").exists()
    assert "TrainingError: the loss is nan" in (tmp_path / "run" / "out.log").read_text()


def test_nan_at_the_first_step_is_not_blamed_on_the_learning_rate(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """A damaged checkpoint would send the user to tune the learning rate."""
    with torch.no_grad():
        clip.model.ln_final.weight[0] = math.nan
    cg.apply_lora(clip, r=2)
    with pytest.raises(
        cg.errors.TrainingError, match="nan at step 1: likely the base or an image holds broken"
    ):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", batch_size=8, epochs=1, workers=0, progress=False))
    with pytest.raises(
        cg.errors.TrainingError, match="before the first step: likely the base or an image holds"
    ):
        fit(clip, pairs, tmp_path / "measured")


def test_out_of_memory_says_what_to_change(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commonest failure on a GPU should not need a search on the web."""

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Encoder, "encode_image", full)
    with pytest.raises(cg.errors.TrainingError, match="halve `batch_size` and double `accum_freq`"):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", batch_size=8, epochs=1, workers=0, progress=False))


def test_gradients_are_clipped(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--grad-clip-norm` would be accepted and ignored."""
    norms = []
    for clip_norm in (None, 1e-4):
        clip = make_clip()
        cg.apply_lora(clip, r=2, dropout=0)
        fit(clip, pairs, tmp_path / str(clip_norm), epochs=1, grad_clip_norm=clip_norm)
        parts = [p.grad for p in clip.model.parameters() if p.grad is not None]
        norms.append(torch.stack([part.norm() for part in parts]).norm().item())
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_grad_checkpointing_changes_memory_not_results(
    family: str, make_clip: MakeClip, hf_folder: Path, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Dropout must be replayed when activations are computed again."""
    found = []
    for grad_checkpointing in (False, True):
        clip = make_clip() if family == "open_clip" else load(str(hf_folder))
        torch.manual_seed(0)
        cg.apply_lora(clip, r=2, dropout=0.3, targets="linear")
        out = tmp_path / str(grad_checkpointing)
        fit(clip, pairs, out, epochs=1, grad_checkpointing=grad_checkpointing)
        found.append(losses(out))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_bf16_losses_are_close_to_fp32(
    family: str, tiny_config: Path, hf_folder: Path, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Lower precision is for speed; it must train the same thing."""
    source = (str(tiny_config), "none") if family == "open_clip" else (str(hf_folder), None)
    found = {}
    for kind in ("fp32", "amp_bf16", "bf16"):
        clip = load(*source, precision="bf16" if kind == "bf16" else "fp32")
        torch.manual_seed(0)
        cg.apply_lora(clip, r=4, dropout=0.0, targets="linear", train_logit_scale=True)
        fit(clip, pairs, tmp_path / kind, epochs=1, lr=1e-3, autocast=kind == "amp_bf16")
        trained = {p.dtype for p in clip.model.parameters() if p.requires_grad}
        assert trained == {torch.float32}, "adapters and temperature stay fp32 over any base"
        found[kind] = losses(tmp_path / kind)
        assert all(map(math.isfinite, found[kind]))
        assert found[kind] == pytest.approx(found["fp32"], rel=0.05), kind


def test_the_temperature_moves_over_a_bf16_base(tiny_config: Path, pairs: cg.Pairs, tmp_path: Path) -> None:
    """bf16 cannot hold a step of 1e-4 from 2.66: `--lora-train-logit-scale` would do nothing."""
    clip = load(str(tiny_config), "none", precision="bf16")
    cg.apply_lora(clip, r=2, train_logit_scale=True)
    before = clip.logit_scale.item()
    result = fit(clip, pairs, tmp_path / "run", lr=1e-4)
    assert 0 < abs(clip.logit_scale.item() - before) < 1e-2
    assert cg.read_adapter(result.saved).logit_scale == pytest.approx(clip.logit_scale.item())


def test_augment_needs_an_augmenting_base(hf_clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--augment` would be accepted and do nothing."""
    cg.apply_lora(hf_clip, r=2, targets="vision-attention")
    with pytest.raises(cg.errors.ConfigError, match="`augment`: this base brings no augmenting transform"):
        fit(hf_clip, pairs, tmp_path / "run", augment=True)


def test_validation_images_are_encoded_anew_when_their_tower_trains(clip: Clip, pairs: cg.Pairs) -> None:
    """Validation would show the image tower as it was before training."""
    options: dict[str, Any] = {
        "batch_size": 8,
        "accum_freq": 1,
        "seed": 0,
        "augment": False,
        "encoder": Encoder(clip),
        "workers": 0,
        "progress": False,
    }
    cg.apply_lora(clip, r=2, targets="vision-attention")
    assert prepared(clip, pairs, val=pairs, **options).val_images is None


def test_frequencies(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """`--save-frequency 2 --val-frequency 3` decide what is kept and measured; the last epoch always is."""
    cg.apply_lora(clip, r=2)
    result = fit(clip, pairs, tmp_path / "run", epochs=5, save_frequency=2, val_frequency=3)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best.pt", "epoch_2", "epoch_4", "epoch_5", "latest.pt"]
    assert [line["epoch"] for line in result.history] == [3, 5]


def test_the_run_folder_is_laid_out_as_open_clips(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Scripts that read open_clip's run folders look for these names."""
    cg.apply_lora(clip, r=2)
    run = tmp_path / "lần chạy 1"
    fit(clip, pairs, run, epochs=1, save_lora_only=False, params={"model": "tiny"})
    assert {path.name for path in run.iterdir()} == {
        "adapter",
        "checkpoints",
        "events.jsonl",
        "out.log",
        "params.json",
        "params.txt",
        "results.json",
        "tensorboard",
        "validation.json",
    }
    assert "model: tiny\n" in (run / "params.txt").read_text()
    whole = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert {"epoch", "name", "state_dict", "lora_config"} == whole.keys()
    assert "epoch 1: image_to_text_R@1" in (run / "out.log").read_text()
    assert "saved " in (run / "out.log").read_text()


def test_events_hold_the_numbers_and_tensorboard_the_same(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Curves in TensorBoard must be the run's own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cg.apply_lora(clip, r=2)
    fit(clip, pairs, tmp_path / "run", epochs=2)
    events = train_events(tmp_path / "run")
    assert [event["step"] for event in events] == list(range(1, 7))
    assert all(event["pairs_per_second"] > 0 for event in events)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx({event["step"]: event["loss"] for event in events})


def test_options_are_checked_all_at_once(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """From Python, too, every wrong option is named in one go."""
    with pytest.raises(cg.errors.ConfigError) as caught:
        fit(clip, pairs, tmp_path / "run", lr=-1, epochs="many", batchsize=3)
    told = str(caught.value).splitlines()
    assert len(told) == 3
    assert [line.split(": ")[:2] for line in told] == [
        ["TrainArgs", name] for name in ("epochs", "lr", "batchsize")
    ]


def test_no_bar_is_drawn_into_a_log_file(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """CI logs would fill with thousands of redrawn bars."""
    cg.apply_lora(clip, r=2)
    fit(clip, pairs, tmp_path / "run", epochs=1, progress=True)
    assert capfd.readouterr().err == ""
