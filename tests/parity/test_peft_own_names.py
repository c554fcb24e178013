"""Adapters of models that go by their own module names: stock PEFT opens ours, and clipgraft opens PEFT's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from explicit_lora import bound, largest, randomise_lora
from tiny_dual import BUILDERS, build, stock_features

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]
# Parameters that no module of their own holds: PEFT adapts modules.
_NO_MODULES = {
    "ViT and BERT": "all,-vision.position_embedding",
    "own DINOv2 and XLM-R": "all,-vision.position_embedding",
    "own towers": "all,-vision.*.q+k+v+out",
}


@pytest.fixture(params=list(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def targets(name: str) -> str:
    return "text.*.*,text.*" if name.startswith("open_clip") else _NO_MODULES.get(name, "all")


def test_stock_peft_opens_ours(name: str, tmp_path: Path) -> None:
    """PEFT ignores sites of a saved adapter, with no more than a warning, or computes something else."""
    model = build(name)
    cg.apply_lora(model, r=3, alpha=5, targets=targets(name), rank_pattern={targets(name).split(",")[0]: 2})
    randomise_lora(model, size=0.1)
    cg.save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(build(name), tmp_path).eval()
    # In eval mode torch's own block reads the weights of its Linears, and PEFT's update of them is ignored.
    mode = name == "own towers"
    with torch.no_grad():
        wanted = stock_features(model, name)
        theirs = stock_features(peft.base_model.model.train(mode), name)
    assert largest(theirs, wanted) <= bound(wanted)
    assert largest(theirs, stock_features(build(name), name)) > 1e-3


def test_ours_opens_what_peft_saved(name: str, tmp_path: Path) -> None:
    """An adapter that was trained with PEFT on such a model cannot be brought along."""
    base = build(name)
    refs = as_clip(base).site_refs
    chosen = [ref.module for ref in refs.values()]
    modules = [path for path in chosen if _adaptable(base, path)]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(2)
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    peft.save_pretrained(tmp_path)
    cg.load_adapter(base, tmp_path)
    with torch.no_grad():
        wanted = stock_features(peft.base_model.model.train(name == "own towers"), name)
        assert largest(stock_features(base, name), wanted) <= bound(wanted)
        assert largest(wanted, stock_features(build(name), name)) > 1e-3


def _adaptable(base: nn.Module, path: str) -> bool:
    """A module that PEFT adapts and that its model calls; of open_clip the text tower alone."""
    if hasattr(base, "visual") and path.startswith("visual"):
        return False
    return type(base.get_submodule(path)) in (nn.Linear, nn.Conv2d) or isinstance(
        base.get_submodule(path), nn.Embedding
    )


@pytest.mark.parametrize("name", ["open_clip XLM-R", "own towers", "ViT and BERT"])
def test_peft_refuses_what_it_cannot_run(name: str, tmp_path: Path) -> None:
    """PEFT opens an adapter with sites that it has no module for, and leaves those out."""
    model = build(name)
    cg.apply_lora(model, r=2, targets="all")
    folder = cg.save_adapter(model, tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "CLIPGRAFT_LORA"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(build(name), folder)
