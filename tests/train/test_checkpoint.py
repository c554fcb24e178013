"""Checkpoints are whole or refused, and bring back everything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import nn

import clipgraft as cg
from clipgraft.train import checkpoint
from clipgraft.train.args import TrainArgs
from clipgraft.train.checkpoint import Position, load_checkpoint, save_checkpoint
from clipgraft.train.setup import make_optimizer

SETTINGS = {"lr": 1e-3, "batch_size": 4, "lora": None}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def trained(seed: int = 0, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model(seed)
    optimizer = make_optimizer(model, TrainArgs(lr=1e-2, wd=0.1))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def all_equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(all_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(all_equal, left, right))
    return bool(left == right)


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """What is not restored (moments, batch statistics, random numbers) changes the result silently."""
    model, optimizer = trained()
    save_checkpoint(tmp_path / "latest.pt", model, optimizer, Position(1, 2, 7), SETTINGS)
    for _ in range(3):
        step(model, optimizer)
    fresh = small_model(seed=9)
    other = make_optimizer(fresh, TrainArgs(lr=1e-2, wd=0.1))
    assert load_checkpoint(tmp_path / "latest.pt", fresh, other, SETTINGS) == Position(1, 2, 7)
    for _ in range(3):
        step(fresh, other)
    assert all_equal(fresh.state_dict(), model.state_dict())
    assert all_equal(other.state_dict(), optimizer.state_dict())


def test_frozen_weights_are_not_in_the_file(tmp_path: Path, tiny_openclip: nn.Module) -> None:
    """Every checkpoint of an adapter would be as large as the base: 600 MB an epoch."""
    cg.apply_lora(tiny_openclip, r=2)
    optimizer = make_optimizer(tiny_openclip, TrainArgs(lr=1e-3, wd=0.1))
    save_checkpoint(tmp_path / "latest.pt", tiny_openclip, optimizer, Position(), SETTINGS)
    assert (tmp_path / "latest.pt").stat().st_size < 60_000
    saved = torch.load(tmp_path / "latest.pt", weights_only=True)["weights"]
    assert len(saved) == 16
    assert all(".lora_" in name for name in saved)


def test_latest_is_readable_while_it_is_rewritten(tmp_path: Path) -> None:
    """A kill or a copy at the wrong moment would find half a checkpoint."""
    path = tmp_path / "latest.pt"
    model, optimizer = trained()
    save_checkpoint(path, model, optimizer, Position(0, 0, 0), SETTINGS)

    def rewrite() -> None:
        for number in range(1, 40):
            save_checkpoint(path, model, optimizer, Position(0, 0, number), SETTINGS)

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(load_checkpoint(path, *trained(steps=1), SETTINGS).step)
    writer.join()
    assert seen == sorted(seen)
    assert load_checkpoint(path, *trained(steps=1), SETTINGS).step == 39
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


def test_names_of_settings_stay_on_their_line(tmp_path: Path) -> None:
    """A stranger's checkpoint could write a line that looks like ours."""
    path = tmp_path / "latest.pt"
    save_checkpoint(path, *trained(), Position(0, 1, 1), {**SETTINGS, "a\nclipgraft: b": 1})
    with pytest.raises(cg.errors.CheckpointError, match="belongs to a run with other settings") as caught:
        load_checkpoint(path, *trained(), SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk would take the last good checkpoint with it."""
    path = tmp_path / "latest.pt"
    model, optimizer = trained()
    save_checkpoint(path, model, optimizer, Position(0, 1, 1), SETTINGS)

    def full(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(cg.errors.WriteError, match=r"latest\.pt: no space left on the disk.*; make room"):
        save_checkpoint(path, model, optimizer, Position(0, 2, 2), SETTINGS)
    assert load_checkpoint(path, *trained(), SETTINGS) == Position(0, 1, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


@pytest.fixture
def good_file(tmp_path: Path) -> bytes:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "good.pt", model, optimizer, Position(), SETTINGS)
    return (tmp_path / "good.pt").read_bytes()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["cut", "random", "flipped"]),
    place=st.integers(0, 2**20),
    junk=st.binary(max_size=300),
)
@example(kind="random", place=0, junk=b"version https://git-lfs.github.com/spec/v1\n")
@example(kind="random", place=0, junk=b"<!doctype html>")
def test_damaged_files_are_refused_in_one_line(
    kind: str, place: int, junk: bytes, good_file: bytes, tmp_path: Path
) -> None:
    """A half-copied checkpoint would end in a page of traceback, or be trained on."""
    place %= len(good_file)
    flipped = good_file[:place] + bytes([good_file[place] ^ 4]) + good_file[place + 1 :]
    damaged = {"cut": good_file[:place], "random": junk, "flipped": flipped}[kind]
    (tmp_path / "latest.pt").write_bytes(damaged)
    model, optimizer = trained(seed=5)
    told = "start the run again"
    try:
        load_checkpoint(tmp_path / "latest.pt", model, optimizer, SETTINGS)
    except cg.errors.CheckpointError as error:
        told = str(error)
    else:  # a bit between the archive's parts is nobody's
        assert kind == "flipped"
        assert all_equal(model.state_dict(), trained()[0].state_dict())
    # Hypothesis writes git-lfs pointers and pages too, since readers.py names how they begin.
    assert any(way in told for way in ("start the run again", "git lfs pull", "download it again"))
    assert "\n" not in told


class Trap:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize(
    "foreign",
    [{"epoch": 3, "state_dict": {}}, {"format": 1}, {"format": 99}, [1, 2], Trap()],
    ids=["open_clip", "other format 1", "newer", "list", "code"],
)
def test_foreign_files_are_refused(foreign: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's checkpoint must be named as such, and never run code."""
    monkeypatch.chdir(tmp_path)
    torch.save(foreign, "latest.pt")
    with pytest.raises(cg.errors.CheckpointError, match="start the run again"):
        load_checkpoint(Path("latest.pt"), *trained(), SETTINGS)
    assert not Path("trapped").exists()


def test_other_settings_are_named(tmp_path: Path) -> None:
    """A run that goes on with another learning rate is neither the old run nor a new one."""
    path = tmp_path / "latest.pt"
    save_checkpoint(path, *trained(), Position(), SETTINGS)
    with pytest.raises(
        cg.errors.CheckpointError, match=r"lr \(was 0.001, now 0.002\); use the same settings"
    ):
        load_checkpoint(path, *trained(), {**SETTINGS, "lr": 2e-3})


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Weights of another architecture would be half loaded."""
    save_checkpoint(tmp_path / "latest.pt", *trained(), Position(), SETTINGS)
    other = nn.Linear(4, 3)
    before = other.weight.detach().clone()
    optimizer = make_optimizer(other, TrainArgs(lr=1e-2, wd=0.1))
    with pytest.raises(cg.errors.CheckpointError, match="other trainable weights"):
        load_checkpoint(tmp_path / "latest.pt", other, optimizer, SETTINGS)
    assert torch.equal(other.weight, before)


def test_no_checkpoint_is_an_error_of_its_own(tmp_path: Path) -> None:
    """`--resume` of a path that does not exist must not look like a damaged file."""
    with pytest.raises(cg.errors.CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "latest.pt", *trained(), SETTINGS)
