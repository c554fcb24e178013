"""An interrupted run that goes on ends with the same bits as one that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.models import device
from clipgraft.models.clip import Clip
from clipgraft.train import checkpoint, loop
from clipgraft.train.run_folder import RunFolder, Saver
from clipgraft.train.validation import Validation
from fitting import groups
from run_comparison import dies_at, differences, events, run_contents
from tar_shards import write_shards

MakeClip = Callable[[], Clip]
Train = Callable[..., None]
STEPS, EPOCHS = 6, 2


@pytest.fixture
def train(make_clip: MakeClip, pairs: cg.Pairs) -> Train:
    """Two epochs of six steps of a text adapter with dropout, a checkpoint every four steps."""

    def run(out: Path, resume: bool = False, pairs: cg.Pairs = pairs, **changes: Any) -> None:
        clip = make_clip()
        torch.manual_seed(0)
        targets = changes.pop("targets", "text-attention")
        variant = changes.pop("variant", "lora")
        cg.apply_lora(clip, r=2, dropout=0.3, targets=targets, variant=variant, train_logit_scale=True)
        options: dict[str, Any] = {
            "batch_size": 4,
            "epochs": EPOCHS,
            "lr": 1e-2,
            "checkpoint_steps": 4,
            "workers": 0,
            **changes,
        }
        cg.fit(clip, pairs, pairs, **groups(out=out, resume=resume, progress=False, **options))

    return run


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert differences(run_contents(resumed), run_contents(whole)) == []
    assert events(resumed) == events(whole)
    assert len(events(whole)) == 1 + STEPS * EPOCHS + EPOCHS


# Events: the base, 6 steps, validation, 6 steps, validation. Checkpoints: after steps 4, 6, 8 and 12.
MOMENTS = {
    "before the base is recorded": (Validation, "begin", 1, True),
    "after the base is recorded, before it is reported": (RunFolder, "event", 1, True),
    "after the base is reported": (RunFolder, "event", 1, False),
    "before the first checkpoint": (RunFolder, "event", 3, False),
    "between two checkpoints": (RunFolder, "event", 7, False),
    "after validation, before it is recorded": (RunFolder, "event", 8, True),
    "after validation is recorded": (RunFolder, "event", 8, False),
    "before the best epoch is noted": (Validation, "add", 2, True),
    "while the best epoch is noted": (Validation, "_write", 2, True),
    "after the best epoch is noted": (Validation, "add", 2, False),
    "before the best epoch is given back": (Validation, "restore", 1, True),
    "in the second epoch, before its first checkpoint": (RunFolder, "event", 9, False),
    "before an epoch's adapter is saved": (Saver, "save_epoch", 1, True),
    "right after an epoch's checkpoint": (loop, "save_checkpoint", 2, False),
    "instead of a checkpoint": (loop, "save_checkpoint", 3, True),
    "while a checkpoint is written": (checkpoint.torch, "save", 3, False),
    "right after the last checkpoint": (loop, "save_checkpoint", 4, False),
    "before the final adapter": (Saver, "save_final", 1, True),
    "after the final adapter": (Saver, "save_final", 1, False),
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run that is never interrupted is kept for all tests of this file."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(whole_runs: Path, train: Train) -> Path:
    """The run that was left alone."""
    if not (whole_runs / "results.json").exists():
        train(whole_runs)
    return whole_runs


@pytest.mark.parametrize("moment", MOMENTS)
def test_death_at_any_moment_changes_nothing(moment: str, train: Train, whole: Path, tmp_path: Path) -> None:
    """A preempted machine would give another adapter, or events twice, than a run left alone."""
    where, name, call, before = MOMENTS[moment]
    with dies_at(where, name, call, before=before):
        train(tmp_path / "killed")
    train(tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", whole)


def test_two_deaths_in_one_run(train: Train, whole: Path, tmp_path: Path) -> None:
    """A machine that is preempted again and again must still come to the same end."""
    for resume, call in ((False, 5), (True, 3)):
        with dies_at(RunFolder, "event", call, before=False):
            train(tmp_path / "killed", resume=resume)
    train(tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", whole)


def test_image_tower_with_crops_dropout_and_accumulation(train: Train, tmp_path: Path) -> None:
    """Random crops, dropout in both passes and the place inside the epoch must all be replayed."""
    options = {"targets": "vision-attention,text.*.fc1", "augment": True, "accum_freq": 2, "batch_size": 2}
    train(tmp_path / "whole", **options)
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "killed", **options)
    train(tmp_path / "killed", resume=True, **options)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_shards_resumed_equal_files(train: Train, pictures: Path, tmp_path: Path) -> None:
    """A run on tar files would see other batches or crops than one on image files, or others once resumed."""
    shards = cg.read_pairs(write_shards(pictures, tmp_path / "shards"))
    options = {"targets": "vision-attention,text.*.fc1", "augment": True, "workers": 2}
    train(tmp_path / "files", **options)
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "shards_run", pairs=shards, **options)
    train(tmp_path / "shards_run", resume=True, pairs=shards, **options)
    assert_same_run(tmp_path / "shards_run", tmp_path / "files")


@pytest.mark.parametrize("cache_views", [None, 2])
def test_a_frozen_image_tower_with_crops(cache_views: int | None, train: Train, tmp_path: Path) -> None:
    """The second epoch of a resumed run would see other crops, or views, than that of a run left alone."""
    options = {"augment": True, "cache_views": cache_views, "cache": FeatureCache(tmp_path / "features")}
    train(tmp_path / "whole", **options)
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "killed", **options)
    train(tmp_path / "killed", resume=True, **options)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_vera(train: Train, tmp_path: Path) -> None:
    """The random matrices of VeRA are others in the process that goes on, or its vectors start anew."""
    train(tmp_path / "whole", variant="vera", lora_plus_ratio=4.0)
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "killed", variant="vera", lora_plus_ratio=4.0)
    train(tmp_path / "killed", variant="vera", lora_plus_ratio=4.0, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_an_image_adapter_on_stored_activations(train: Train, tmp_path: Path) -> None:
    """A resumed run would go on with other activations, or without dropout on them."""
    cache = FeatureCache(tmp_path / "features")
    options = {"targets": "vision.1.*,text.*.fc1", "cache": cache}
    train(tmp_path / "whole", **options)
    assert list(cache.folder.glob("*/*.npy"))
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "killed", **options)
    shutil.rmtree(cache.folder)
    train(tmp_path / "killed", resume=True, **options)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("fast", [True, False])
def test_a_resumed_run_keeps_its_precision(
    fast: bool, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that came out the other way would make a run impossible to resume, or change its bits."""
    measured = [4.0, 1.0] if fast else [1.0, 4.0]
    monkeypatch.setattr(device, "bf16_speed", lambda device: measured[0])
    train(tmp_path / "whole", autocast=None)
    with dies_at(RunFolder, "event", 9, before=False):
        train(tmp_path / "killed", autocast=None)
    measured.pop(0)
    train(tmp_path / "killed", resume=True, autocast=None)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert f"autocast: {fast}\n" in (tmp_path / "killed" / "params.txt").read_text()
    with pytest.raises(cg.errors.CheckpointError, match=f"autocast \\(was {fast}, now {not fast}\\)"):
        train(tmp_path / "killed", resume=True, autocast=not fast)


def test_a_run_without_a_checkpoint_measures_its_precision(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed in its first steps is resumed before there is anything to go by."""
    monkeypatch.setattr(device, "bf16_speed", lambda device: 4.0)
    with dies_at(RunFolder, "event", 2, before=False):
        train(tmp_path / "killed", autocast=None)
    train(tmp_path / "killed", resume=True, autocast=None)
    assert "autocast: True\n" in (tmp_path / "killed" / "params.txt").read_text()


def test_a_cache_that_was_deleted_meanwhile(train: Train, whole: Path, tmp_path: Path) -> None:
    """Whoever makes room on a disk would have to start the run again."""
    cache = FeatureCache(tmp_path / "features")
    with dies_at(RunFolder, "event", 5, before=False):
        train(tmp_path / "killed", cache=cache)
    shutil.rmtree(cache.folder)
    train(tmp_path / "killed", resume=True, cache=cache)
    assert_same_run(tmp_path / "killed", whole)


def test_resuming_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    """A job that is restarted once too often must not train on, or lose its metrics."""
    train(tmp_path / "run")
    before = run_contents(tmp_path / "run")
    train(tmp_path / "run", resume=True)
    assert differences(run_contents(tmp_path / "run"), before) == []


def test_a_used_folder_is_refused(train: Train, tmp_path: Path) -> None:
    """Two runs in one folder would mix their events and overwrite each other's adapters."""
    train(tmp_path / "run", epochs=1)
    with pytest.raises(
        cg.errors.ConfigError, match=r"exists already: add `resume=True` .* or choose another `out`"
    ):
        train(tmp_path / "run", epochs=1)


def test_other_settings_are_refused_by_name(train: Train, tmp_path: Path) -> None:
    """A resumed run with a typo in its learning rate would be neither the old run nor a new one."""
    train(tmp_path / "run", epochs=1)
    with pytest.raises(cg.errors.CheckpointError, match=r"lr \(was 0.01, now 0.02\)"):
        train(tmp_path / "run", resume=True, epochs=1, lr=0.02)


def test_events_cut_short_by_a_kill_are_dropped(train: Train, tmp_path: Path) -> None:
    """A half-written last line would make the run impossible to resume."""
    train(tmp_path / "run")
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    train(tmp_path / "run", resume=True)
    assert len(events(tmp_path / "run")) == 1 + STEPS * EPOCHS + EPOCHS


def test_a_damaged_event_is_named(train: Train, tmp_path: Path) -> None:
    """Garbage from a power cut should cost one line, not the run."""
    train(tmp_path / "run", epochs=1)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write("\0\0\0\n")
    with pytest.raises(
        cg.errors.CheckpointError, match=r"events\.jsonl, line 9: is not JSON .*; delete that line"
    ):
        train(tmp_path / "run", resume=True, epochs=1)


@pytest.mark.slow
def test_sigkill_and_resume_from_the_command_line(tmp_path: Path, pictures: Path, tiny_config: Path) -> None:
    """The real thing: a process killed at a random step, and a second process that goes on."""
    step = random.randrange(5, STEPS * EPOCHS)
    print(f"killed after step {step}")  # shown if the test fails
    script = (
        "import os, sys\nfrom clipgraft.cli import main\nfrom clipgraft.train.run_folder import RunFolder\n"
        "report = RunFolder.event\n"
        "def event(self, kind, step, values):\n"
        "    report(self, kind, step, values)\n"
        f"    if step == {step} and sys.argv[-1] == 'killed': os.kill(os.getpid(), 9)\n"
        "RunFolder.event = event\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = (
        f"--model {tiny_config} --pretrained none --precision fp32 --use-lora --lora-r 2 --batch-size 4 "
        "--epochs 2 --lr 1e-2"
    )
    command = [sys.executable, "-c", script, "train", "--train-data", str(pictures), "--logs", str(tmp_path)]
    command += [*flags.split(), "--checkpoint-steps", "4", "--save-lora-only", "--val-data", str(pictures)]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> int:
        return subprocess.run([*command, *more], capture_output=True, env=env, check=False).returncode

    assert run("--name", "killed") == -signal.SIGKILL
    assert run("--resume", "latest", "--name=killed") == 0
    assert run("--name", "whole") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_seconds_are_those_of_all_parts(train: Train, tmp_path: Path) -> None:
    """A run that was interrupted after ten hours would say that it took ten minutes."""
    with dies_at(loop, "save_checkpoint", 2, before=False):
        train(tmp_path / "run")
    assert float((tmp_path / "run" / "seconds.txt").read_text()) > 0
    (tmp_path / "run" / "seconds.txt").write_text("36000")
    train(tmp_path / "run", resume=True)
    for _ in range(2):  # a finished run that is resumed has nothing to do, and still knows
        seconds = json.loads((tmp_path / "run" / "results.json").read_text())["seconds"]
        assert 36_000 < seconds < 36_600
        train(tmp_path / "run", resume=True)
