"""`clipgraft train --from`: a new run that starts from weights that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from fitting import groups

LORA = ("--use-lora", "--lora-r", 2, "--lora-alpha", 6, "--lora-targets", "text.*.q,v", "--lr", "1e-2")


@pytest.fixture
def first(train: Any, tmp_path: Path) -> Path:
    """A run that made an adapter of rank 2 on four sites."""
    assert train(*LORA, "--name", "first").code == 0
    return tmp_path / "logs" / "first"


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "adapter" / "clipgraft.json").read_text()))


def test_from_an_adapter(cli: Any, first: Path, table: Path, tmp_path: Path) -> None:
    """An adapter cannot be trained further on other data, or it begins anew without a word."""
    logs = tmp_path / "logs"
    words = ["--train-data", table, "--logs", logs, "--batch-size", 8, "--epochs", 1, "--workers", 0]
    words += ["--precision", "fp32", "--from", first, "--lr", "1e-12"]
    outcome = cli("train", *words, "--name", "second", "--lora-dropout", 0.5)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"starting from {first}: LoRA r=2 on 4 sites (text.*.q,v)" in outcome.out
    before, after = cg.read_adapter(first), cg.read_adapter(logs / "second")
    assert after.started_from == str(first / "adapter")
    assert after.settings.targets == "text.*.q,v"
    assert (after.settings.r, after.settings.alpha, after.settings.dropout) == (2, 6, 0.5)
    for site, (a, b) in before.weights.items():
        assert torch.allclose(after.weights[site][0], a, atol=1e-6)
        assert torch.allclose(after.weights[site][1], b, atol=1e-6)
    params = json.loads((logs / "second" / "params.json").read_text())
    assert (params["from"], params["started_from"]) == (str(first), str(first / "adapter"))
    again = cli(
        "train", *words, "--name", "second", "--lora-dropout", 0.5, "--resume", "latest", "--epochs", 2
    )
    assert (again.code, again.err) == (0, "")


def test_other_formats(cli: Any, train: Any, first: Path, tmp_path: Path) -> None:
    """The guide's files can be used, but not trained further."""
    guide = tmp_path / "epoch_1.pt"
    assert cli("convert", first, guide, "--to", "guide").code == 0
    outcome = train("--from", guide, "--name", "second")
    assert (outcome.code, outcome.err) == (0, "")
    assert record(tmp_path / "logs" / "second")["started_from"] == str(guide)


def test_from_a_fine_tuned_run(cli: Any, train: Any, table: Path, tmp_path: Path) -> None:
    """The weights of full fine-tuning are left behind, or the run begins with those before it."""
    assert train("--name", "full", "--lr", "1e-2").code == 0
    run = tmp_path / "logs" / "full"
    words = ["--train-data", table, "--logs", tmp_path / "logs", "--batch-size", 8, "--epochs", 1]
    words += ["--workers", 0, "--precision", "fp32", "--from", run, "--lr", "1e-12"]
    outcome = cli("train", *words, "--name", "more")
    assert (outcome.code, outcome.err) == (0, "")
    texts = ["a red shoe"]
    with torch.no_grad():
        assert torch.allclose(
            cg.load(run).encode_text(texts), cg.load(tmp_path / "logs/more").encode_text(texts), atol=1e-5
        )
    assert cli("train", *words, "--name", "lora", "--use-lora").code == 0
    assert cg.load(tmp_path / "logs" / "lora").fingerprint == cg.load(run).fingerprint


def test_flags_that_contradict_it(train: Any, cli: Any, first: Path, hf_folder: Path, tmp_path: Path) -> None:
    """A flag that cannot be followed is ignored in silence."""
    words = ("--from", first, "--name", "second")
    assert train(*words, "--lora-r", 2, "--lora-alpha", 6, "--lora-targets", "text.*.q,text.*.v").code == 0
    refused = train(*words[:3], "third", "--lora-r", 8, "--lora-alpha", 6, "--lora-targets", "text-attention")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "drop --lora-r 8 (it has 2), --lora-targets: 8 sites (it has 4: text.*.q,v)" in refused.err
    other = train("--from", first, "--model", hf_folder)
    assert (other.code, other.err.count("\n")) == (2, 1)
    missing = train("--from", tmp_path / "nowhere")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "there is no such file or folder" in missing.err


def test_fit_on_a_loaded_adapter(first: Path, table: Path, tmp_path: Path) -> None:
    """In Python a loaded adapter cannot be trained on, or nobody knows later where it began."""
    clip = cg.load(first)
    pairs = cg.read_pairs(table)
    cg.fit(
        clip,
        pairs,
        **groups(out=tmp_path / "more", epochs=1, batch_size=8, lr=1e-2, workers=0, progress=False),
    )
    assert record(tmp_path / "more")["started_from"] == str(first / "adapter")
    left, right = cg.read_adapter(first), cg.read_adapter(tmp_path / "more")
    assert any(not torch.equal(left.weights[site][1], right.weights[site][1]) for site in left.weights)
