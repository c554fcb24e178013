"""The contestants of the SigLIP benchmark train the same model on the same batches."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks.contestants import siglip
from transformers import SiglipConfig, SiglipModel


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny SigLIP, which each contestant gets a copy of."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
    )
    for name, value in {"VOCABULARY": 100, "LENGTH": 16, "DIM": 32, "SIZE": 32, "RANK": 2}.items():
        monkeypatch.setattr(siglip, name, value)
    monkeypatch.setattr(siglip, "base", lambda: copy.deepcopy(model))
    monkeypatch.setattr("benchmarks.contestants.loop.reset_peak", lambda: None)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("towers", ["text", "both"])
def test_contestants_begin_with_the_same_loss(towers: str) -> None:
    """Speeds of two different things would be compared."""
    options = {"rows": 4, "warmup": 1, "steps": 2}
    ours = siglip.ours(towers, bf16=False, **options)
    peers = [siglip.peft(towers, **options), siglip.peft(towers, bf16="autocast", **options)]
    assert all(len(values["step_seconds"]) == 2 for values in (ours, *peers))
    assert all(values["trained"] == ours["trained"] for values in peers)
    assert ours["losses"][0] == pytest.approx(peers[0]["losses"][0], rel=1e-5)
    assert ours["losses"][0] == pytest.approx(peers[1]["losses"][0], rel=2e-2)
