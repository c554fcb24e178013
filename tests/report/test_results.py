"""The results folder of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import clipgraft as cg
from clipgraft.models.load import load
from clipgraft.report.results import write_results
from flop_counting import counted


@pytest.fixture
def clip(tiny_config: Path) -> cg.Clip:
    """A tiny base with an adapter on both towers."""
    clip = load(str(tiny_config), "none")
    cg.apply_lora(clip, r=2, targets="attention")
    return clip


def test_what_is_handed_over(clip: cg.Clip, tmp_path: Path) -> None:
    """The results of a run lack a number, or say one that the model does not have."""
    write_results(clip, tmp_path, {"acc1": 0.5, "loss": 1.25})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model_type"] == "open_clip.model.CLIP"
    assert result["test_result"] == [{"acc1": 0.5, "loss": 1.25}]
    assert result["params"] == sum(p.numel() for p in clip.model.parameters())
    assert result["trainable_params"] == cg.count_parameters(clip).lora
    assert 0 < result["run_time"] < 60
    assert 2 * result["macs"] < result["flops"] < 3 * result["macs"]
    size = clip.family.image_size(clip.model)

    def run() -> None:
        clip.family.encode_image(clip.model, torch.zeros(1, 3, *size))
        clip.family.encode_text(clip.model, torch.zeros(1, clip.context_length, dtype=torch.int64))

    assert result["macs"] == counted(run)


def test_the_layer_table_adds_up(clip: cg.Clip, tmp_path: Path) -> None:
    """The layer table counts a weight twice or not at all, or hides what trains."""
    write_results(clip, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["test_result"] == []
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    columns = ["Input Shape", "Output Shape", "Param #", "Param %", "Kernel Shape", "Mult-Adds", "Trainable"]
    assert re.split(r" {3,}", lines[1])[1:] == columns
    rows = [line for line in lines if re.search(r"\d-\d", line)]
    counts = [
        int(re.sub(r"\D", "", re.split(r" {3,}", row.split("─", 1)[1])[3])) for row in rows if "%" in row
    ]
    top = re.split(r" {3,}", lines[3])[3]
    own = int(re.sub(r"\D", "", top)) if top != "--" else 0
    assert own + sum(counts) == sum(p.numel() for p in clip.model.parameters())
    assert {"True", "False"} <= {row.split()[-1] for row in rows}


def test_the_structure_shows_the_adapter(clip: cg.Clip, tmp_path: Path) -> None:
    """Twelve equal blocks fill twelve screens, or the adapter is not to be seen."""
    write_results(clip, tmp_path)
    text = (tmp_path / "structure.txt").read_text()
    assert text.count("(0-1): 2 x ResidualAttentionBlock(") == 2
    assert "r=2" in text
