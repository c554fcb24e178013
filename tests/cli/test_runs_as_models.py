"""Run folders where a command takes a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import clipgraft as cg
from clipgraft.data.features import encode_images


def test_a_fine_tuned_run_is_written_as_it_is(cli: Any, train: Any, tmp_path: Path) -> None:
    """What full fine-tuning made cannot be taken elsewhere, for there is no adapter in it to merge."""
    assert train("--name", "full", "--lr", "1e-2").code == 0
    run, out = tmp_path / "logs" / "full", tmp_path / "model"
    outcome = cli("merge", run, out, "--to", "transformers")
    assert (outcome.code, outcome.err) == (0, "")
    assert "there is nothing to merge in a fine-tuned model" in outcome.out
    texts = ["a red shoe"]
    with torch.no_grad():
        wanted = cg.load(run).encode_text(texts)
        assert torch.allclose(cg.load(out).encode_text(texts), wanted, atol=1e-5)
    refused = cli("merge", run, tmp_path / "other", "--to", "adapter", "--rank", 2)
    assert refused.code == 2
    assert "made no adapter, but a fine-tuned model: drop the flag" in refused.err


def test_encode_and_search_with_runs(cli: Any, train: Any, table: Path, tmp_path: Path) -> None:
    """Pictures are encoded by the base instead of what was trained, or search cannot find the model again."""
    assert (
        train("--use-lora", "--lora-targets", "vision-attention", "--name", "lora", "--lr", "1e-1").code == 0
    )
    assert train("--name", "full", "--lr", "1e-2").code == 0
    for name in ("lora", "full"):
        run, out = tmp_path / "logs" / name, tmp_path / "encoded" / name
        made = cli("encode", "--model", run, "--precision", "fp32", table.parent, out, "--workers", 0)
        assert (made.code, made.err) == (0, "")
        found = cli("search", out, "a red shoe", "--format", "json", "--k", 12)
        assert found.code == 0
        clip = cg.load(run)
        pairs = cg.read_pairs(table)
        with torch.no_grad():
            text = clip.encode_text(["a red shoe"], normalize=True)
        images = encode_images(clip, pairs.images, workers=0)
        best = max((images @ text.T).flatten().tolist())
        assert abs(json.loads(found.out)[0]["score"] - best) < 1e-2, name
