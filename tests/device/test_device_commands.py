"""`--device` of the commands, with the stand-in device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipgraft.cli import main
from clipgraft.profile import measure
from standin_device import NAME
from tiny_pictures import write_pictures


def test_from_training_to_search(
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command fails on a GPU for a tensor that was left on the CPU, after minutes of work."""
    monkeypatch.setattr("clipgraft.data.general_texts.GENERAL", 100)
    table = write_pictures(tmp_path / "pictures")
    printed, vectors = [], []
    for device in ("cpu", NAME):
        base = ["--model", tiny_config, "--pretrained", "none", "--precision", "fp32", "--device", device]
        run, encoded = tmp_path / device / "run", tmp_path / device / "encoded"
        adapter = ["--adapter", run / "adapter"]
        train = ["--logs", run.parent, "--name", "run", "--train-data", table, "--use-lora", "--epochs", 1]
        train += ["--lora-dropout", 0]
        commands = [
            ["train", *base, *train, "--batch-size", 8, "--lr", 1e-3, "--workers", 0],
            ["encode", table.parent, encoded, *base, *adapter, "--workers", 0],
            ["search", encoded, "thing 3", "--k", 3],
            ["eval", *base, *adapter, "--val-data", table, "--workers", 0],
        ]
        for command in commands:
            capsys.readouterr()
            assert main([str(word) for word in command]) == 0, command
        printed.append(capsys.readouterr().out.replace(device, "-").replace("-:0", "-"))
        vectors.append(np.load(encoded / "img_emb" / "img_emb_0.npy").astype(np.float32))
    assert printed[0] == printed[1]
    assert np.allclose(*vectors, atol=1e-3)


def test_the_device_is_named_where_it_is_not_known(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has another kind of GPU is not told what to call it."""
    assert main(["profile", str(tiny_config), "--measure", "--device", "tpu"]) == 2
    assert f"allowed is auto, cpu, cuda or cuda:N, or {NAME}" in capsys.readouterr().err


def test_a_measurement_is_of_the_device(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`profile --measure` fails on a GPU."""
    monkeypatch.setattr(measure, "_REPEATS", 1)
    monkeypatch.setattr(measure, "_MATRIX", 32)
    assert main(["profile", str(tiny_config), "--measure", "--device", NAME]) == 0
    assert f"measured on {NAME}" in capsys.readouterr().out
