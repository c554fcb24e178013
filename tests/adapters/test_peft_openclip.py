"""Adapters that stock PEFT made on open_clip models: what it computed with them, and what they mean."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.peft_openclip import OutProj, is_peft_openclip, read_peft_openclip
from damaged_values import damaged, read_or_one_line
from explicit_lora import explicit_model, features, inputs, largest
from guide_lora import updates_of
from tiny_models import to_custom_text

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = {"target_modules": ["attn"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "everything": {"target_modules": ["attn", "c_fc", "c_proj", "conv1", "token_embedding"]},
    "patterns": {
        "target_modules": ["attn", "c_fc"],
        "use_rslora": True,
        "rank_pattern": {"resblocks.0.attn": 2, "c_fc": 3},
        "alpha_pattern": {r"^visual.*attn": 9, "transformer.resblocks.1.mlp.c_fc": 2},
    },
    "out_proj as well": {"target_modules": ["attn", "out_proj"]},
    "linear": {"target_modules": "all-linear"},
}


def trained(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """A stock PEFT model with random updates, saved in `folder`; returns its adapted open_clip model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    wrapped.save_pretrained(folder)
    return wrapped.base_model.model


def read(folder: Path, out_proj: OutProj | None = None) -> AdapterFile:
    """The saved adapter as clipgraft reads it."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    assert is_peft_openclip(tensors, config)
    assert is_peft_openclip(tensors, {})
    return read_peft_openclip(tensors, config, folder, out_proj)


@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_run_is_what_stock_peft_computes(
    name: str, layout: str, tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """An adapter trained with PEFT on open_clip computes something else after it was converted."""
    base = tiny_openclip if layout == "CLIP" else to_custom_text(tiny_openclip)
    model = trained(base, tmp_path, **OPTIONS[name])
    sample = inputs(base)
    with torch.no_grad():
        wanted = features(model, *sample)
    found = features(explicit_model(base, updates_of(read(tmp_path, "as-run"))), *sample)
    assert largest(found, wanted) < 1e-5
    assert largest(features(base, *sample), wanted) > 0.1


def test_as_meant_is_half_of_it(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """`as-meant` changes more than the update of out_proj, or less."""
    trained(tiny_openclip, tmp_path, **OPTIONS["everything"])
    run, meant = (updates_of(read(tmp_path, way)) for way in ("as-run", "as-meant"))
    assert run.keys() == meant.keys()
    for site, (a, b, scale) in meant.items():
        assert torch.equal(a, run[site][0])
        assert torch.equal(b, run[site][1])
        assert run[site][2] == scale * (2 if site.endswith(".out") else 1)
        assert scale == 1.5
    stem = "base_model.model.transformer.resblocks.1.attn"
    raw = load_file(tmp_path / WEIGHTS)
    assert torch.equal(meant["text.1.k"][1], raw[f"{stem}.lora_B.weight"][32:64])
    assert torch.equal(meant["text.1.out"][0], raw[f"{stem}.base_layer.out_proj.lora_A.weight"])


def test_out_proj_alone(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module, tmp_path: Path) -> None:
    """PEFT ignored these updates on open_clip 3 and not on 4: nobody but the user knows which it was."""
    options = {"target_modules": ["out_proj"]}
    model, sample = trained(tiny_openclip, tmp_path / "3", **options), inputs(tiny_openclip)
    with torch.no_grad():
        assert largest(features(model, *sample), features(tiny_openclip, *sample)) < 1e-5
    with pytest.raises(cg.errors.AdapterError, match=r"PEFT ignored them on open_clip 3.*as-run.*as-meant"):
        read(tmp_path / "3")
    with pytest.raises(cg.errors.AdapterError, match=r"never ran what it holds.*as-meant"):
        read(tmp_path / "3", "as-run")
    model = trained(tiny_openclip_4x, tmp_path / "4", **options)
    meant = updates_of(read(tmp_path / "4", "as-meant"))
    with torch.no_grad():
        wanted = features(model, *sample)
    assert largest(features(explicit_model(tiny_openclip_4x, meant), *sample), wanted) < 1e-5


def test_the_choice_is_explained(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A user gets one of two different models without having been asked."""
    trained(tiny_openclip, tmp_path, **ATTENTION)
    with pytest.raises(cg.errors.AdapterError) as caught:
        read(tmp_path)
    told = str(caught.value)
    assert "\n" not in told
    for part in ("W + 2ΔW", "`peft_out_proj='as-run'`", "as-meant", str(tmp_path)):
        assert part in told
    trained(tiny_openclip, tmp_path / "mlp", target_modules=["c_fc"])
    assert len(read(tmp_path / "mlp").weights) == 4
    trained(tiny_openclip, tmp_path / "twice", **OPTIONS["out_proj as well"])
    with pytest.raises(cg.errors.AdapterError, match=r"two updates of .*out.*as-run"):
        read(tmp_path / "twice", "as-meant")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.transformer.resblocks.0.ln_1.lora_A.weight",
        "base_model.model.visual.transformer.resblocks.0.attn.k_proj.lora_A.weight",
        "base_model.model.positional_embedding.lora_A.weight",
        "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "base_model.model.transformer.resblocks.00.attn.lora_A.weight",
        "base_model.model.transformer.resblocks.0.attn.lora_magnitude_vector",
        "base_model.model.transformer.resblocks.0.attn.out_proj.base_layer.weight",
        "logit_scale",
    ],
)
def test_strange_names_are_listed(name: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """Trained weights are dropped without a word."""
    trained(tiny_openclip, tmp_path, target_modules=["c_fc"])
    save_file({**load_file(tmp_path / WEIGHTS), name: torch.ones(4, 32)}, tmp_path / WEIGHTS)
    with pytest.raises(cg.errors.AdapterError, match=f"holds 1 weights .*'{name}'"):
        read(tmp_path)


def test_configurations_that_say_something_else(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """DoRA, or the configuration of another adapter, is read as plain LoRA."""
    trained(tiny_openclip, tmp_path, target_modules=["c_fc"])
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    for change, told in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 5}, "says rank 5"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', and should be a number"),
        ({"lora_alpha": -1}, "alpha: got -1"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
    ):
        with pytest.raises(cg.errors.AdapterError, match=told):
            read_peft_openclip(tensors, {**config, **change}, tmp_path)


def test_transformers_names_are_not_open_clips(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """An adapter folder that clipgraft itself wrote is taken for one of PEFT on open_clip."""
    cg.apply_lora(tiny_hf, targets="all")
    folder = cg.save_adapter(tiny_hf, tmp_path)
    assert not is_peft_openclip(load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text()))


def valid() -> dict[str, Any]:
    stem = "base_model.model.transformer.resblocks.0"
    tensors: dict[str, Tensor] = {
        f"{stem}.attn.lora_A.weight": torch.ones(2, 32),
        f"{stem}.attn.lora_B.weight": torch.ones(96, 2),
        f"{stem}.attn.base_layer.out_proj.lora_A.weight": torch.ones(2, 32),
        f"{stem}.attn.base_layer.out_proj.lora_B.weight": torch.ones(32, 2),
        "base_model.model.visual.conv1.lora_A.weight": torch.ones(2, 3, 8, 8),
        "base_model.model.visual.conv1.lora_B.weight": torch.ones(32, 2, 1, 1),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"x": 3}, "alpha_pattern": {}}
    return {"tensors": tensors, "config": config}


@settings(max_examples=300)
@example(data={**valid(), "config": {**valid()["config"], "lora_alpha": -1}})  # several options are wrong
@given(data=damaged(valid()))
def test_damaged_adapters(data: Any) -> None:
    """A damaged or hostile adapter ends in a traceback instead of one line."""
    parts = [data.get(key) if isinstance(data, dict) else None for key in ("tensors", "config")]
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
        return
    tensors, config = parts
    try:
        json.dumps(config)
    except TypeError:
        return  # no JSON file holds such a thing
    is_peft_openclip(tensors, config)
    found = read_or_one_line(lambda: read_peft_openclip(tensors, config, Path("x"), "as-run"), "x")
    if found is not None:
        updates_of(found)
