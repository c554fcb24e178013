"""The guide's `.pt` layouts: its own procedure runs what we write, and we read what its layers save."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.convert import read_any
from clipgraft.adapters.guide_format import read_guide, write_guide, write_guide_full
from clipgraft.models.clip import as_clip
from clipgraft.train.run_folder import Saver
from damaged_values import damaged, read_or_one_line
from explicit_lora import explicit_model, features, inputs, largest, randomise_lora
from guide_lora import apply_guide, deltas, updates_of

# Options of apply_lora, and whether the update keeps every bit: ratios of scales are powers of two, or not.
ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"r": 4, "alpha": 6}, True),
    "in_proj": ({"r": 4, "alpha": 4, "targets": "text.*.q+k+v"}, True),
    "rslora": ({"r": 4, "alpha": 3, "use_rslora": True}, True),
    "some sites": ({"r": 2, "alpha": 3, "targets": "text.1.q+out"}, True),
    "ranks": (
        {
            "r": 3,
            "alpha": 3,
            "rank_pattern": {"text.0.*": 6, "text.1.q": 1},
            "alpha_pattern": {"text.1.q": 1},
        },
        True,
    ),
    "scales": ({"r": 4, "alpha": 6, "alpha_pattern": {"text.0.v": 1.0, "text.1.*": 0.7}}, False),
    "both": ({"r": 3, "alpha": 5, "use_rslora": True, "rank_pattern": {"text.0.*": 7}}, False),
}


def adapter_of(model: nn.Module, folder: Path, name: str = "plain", **options: Any) -> AdapterFile:
    """An adapter with random weights, read from the folder it was saved in."""
    carrier = copy.deepcopy(model)
    cg.apply_lora(carrier, **{**ADAPTERS[name][0], **options})
    randomise_lora(carrier)
    adapter = cg.read_adapter(cg.save_adapter(carrier, folder, {"text_to_image_R@1": 0.5}))
    base = {"name": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "family": "open_clip"}
    return AdapterFile(**{**vars(adapter), "base": base})


def load_as_the_guide(model: nn.Module, path: Path) -> nn.Module:
    """The guide's loading procedure, step by step."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    config = checkpoint["lora_config"]
    assert (config["model"], config["pretrained"]) == ("ViT-B-32", "laion2b_s34b_b79k")
    model = copy.deepcopy(model)
    assert apply_guide(model, config["r"], config["alpha"], config["target_modules"]) == 2
    known = model.state_dict()
    assert set(checkpoint["lora_state_dict"]) <= set(known)
    model.load_state_dict({**known, **checkpoint["lora_state_dict"]})
    assert checkpoint["epoch"] == 20
    return model.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_guide_loads_what_we_write(name: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """An adapter handed to a colleague who uses the guide's code computes something else there."""
    adapter = adapter_of(tiny_openclip, tmp_path, name)
    model = load_as_the_guide(tiny_openclip, write_guide(adapter, tmp_path / "lora.pt", epoch=20))
    sample = inputs(tiny_openclip)
    wanted = features(explicit_model(tiny_openclip, updates_of(adapter)), *sample)
    assert largest(features(model, *sample), wanted) < 1e-5
    assert largest(features(tiny_openclip, *sample), wanted) > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip(name: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """There and back, an adapter has lost its ranks, its base or the last bits of its weights."""
    adapter = adapter_of(tiny_openclip, tmp_path, name)
    again = read_any(write_guide(adapter, tmp_path / "lora.pt"))
    assert again.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(again.weights[site][0], a) for site, (a, _) in adapter.weights.items())
    for site, delta in deltas(adapter).items():
        bound = 0 if ADAPTERS[name][1] else 2**-22 * delta.abs().max()
        assert (deltas(again)[site] - delta).abs().max() <= bound
    for field in ("base", "fingerprint", "logit_scale", "metrics"):
        assert getattr(again, field) == getattr(adapter, field)
    assert (again.settings.dropout, again.settings.targets) == (0, adapter.settings.targets)
    twice = read_any(write_guide(again, tmp_path / "twice.pt"))
    assert all(torch.equal(twice.weights[s][i], again.weights[s][i]) for s in again.weights for i in (0, 1))


def guide_file(model: nn.Module, path: Path, full: bool, prefix: str = "") -> nn.Module:
    """What a run of the guide saves, and the model that it saved."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    apply_guide(model, 4, 6, ["in_proj", "out_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        model.logit_scale.fill_(3.25)
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    kept = {name: value for name, value in state.items() if full or "lora_" in name}
    config = {
        "model": "ViT-B-32",
        "pretrained": "laion2b_s34b_b79k",
        "r": 4,
        "alpha": 6,
        "dropout": 0.1,
        "target_modules": ["in_proj", "out_proj"],
    }
    checkpoint = {"epoch": 20, "state_dict" if full else "lora_state_dict": kept, "lora_config": config}
    torch.save(
        checkpoint | ({"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}} if full else {}), path
    )
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("full", [False, True])
def test_we_load_what_the_guide_saves(
    full: bool, prefix: str, tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """An adapter that was trained with the guide's code computes something else here."""
    trained = guide_file(tiny_openclip, tmp_path / "epoch_20.pt", full, prefix)
    adapter = read_any(tmp_path / "epoch_20.pt")
    sample = inputs(tiny_openclip)
    found = features(explicit_model(tiny_openclip, updates_of(adapter)), *sample)
    assert largest(found, features(trained, *sample)) < 1e-5
    assert len(adapter.weights) == 8
    assert adapter.base == {"name": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "family": "open_clip"}
    assert (adapter.settings.r, adapter.settings.alpha, adapter.settings.dropout) == (4, 6, 0.1)
    assert (adapter.fingerprint, adapter.logit_scale) == (None, 3.25 if full else None)
    assert adapter.settings.train_logit_scale is full


def test_full_file(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The file with the base in it lacks weights of the base, or changes them."""
    adapter = adapter_of(tiny_openclip, tmp_path, "ranks")
    adapter = AdapterFile(**{**vars(adapter), "logit_scale": 1.5})
    base = tiny_openclip.state_dict()
    path = write_guide_full(adapter, base, tmp_path / "full.pt", epoch=7)
    whole = torch.load(path, weights_only=True)
    assert whole["epoch"] == 7
    kept = {name: value for name, value in whole["state_dict"].items() if "lora_" not in name}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base if name != "logit_scale")
    assert kept["logit_scale"] == 1.5
    model = copy.deepcopy(tiny_openclip)
    config = whole["lora_config"]
    apply_guide(model, config["r"], config["alpha"], config["target_modules"])
    model.load_state_dict(whole["state_dict"], strict=False)
    sample = inputs(model)
    wanted = features(explicit_model(tiny_openclip, updates_of(adapter)), *sample)
    assert largest(features(model.eval(), *sample), wanted) < 1e-5
    assert deltas(read_any(path)).keys() == deltas(adapter).keys()
    assert read_any(path).logit_scale == 1.5


def test_full_file_needs_its_own_base(tiny_openclip: nn.Module, tiny_hf: nn.Module, tmp_path: Path) -> None:
    """A whole model is written with an adapter that is not its own."""
    adapter = adapter_of(tiny_openclip, tmp_path)
    shallow = {n: w for n, w in tiny_openclip.state_dict().items() if ".resblocks.1." not in n}
    for base in (tiny_hf.state_dict(), shallow):
        with pytest.raises(cg.errors.AdapterError, match="the base has no text"):
            write_guide_full(adapter, base, tmp_path / "full.pt")
    cg.apply_lora(tiny_openclip)
    with pytest.raises(cg.errors.AdapterError, match="carries LoRA itself"):
        write_guide_full(adapter, tiny_openclip.state_dict(), tmp_path / "full.pt")
    assert not (tmp_path / "full.pt").exists()


@pytest.mark.parametrize("layout", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
def test_our_own_full_checkpoints(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`epoch_N.pt` of a run without --save-lora-only cannot be turned into an adapter again."""
    model = request.getfixturevalue(layout)
    patterns = {"rank_pattern": {"text.-1.*": 2, "vision.0.q": 7}, "alpha_pattern": {"*.*.fc1": 3.0}}
    cg.apply_lora(model, r=4, alpha=6, dropout=0.25, targets="all", train_logit_scale=True, **patterns)
    randomise_lora(model)
    model.logit_scale.data.fill_(1.25)
    Saver(as_clip(model), tmp_path, lora_only=False).save_epoch(3, {})
    wanted = cg.read_adapter(tmp_path / "checkpoints" / "epoch_3")
    found = read_any(tmp_path / "checkpoints" / "epoch_3.pt")
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(found.weights[s][i], wanted.weights[s][i]) for s in wanted.weights for i in (0, 1))
    ours, theirs = updates_of(found), updates_of(wanted)
    assert all(math.isclose(ours[site][2], theirs[site][2]) for site in theirs)
    assert (found.settings.dropout, found.settings.targets, found.logit_scale) == (0.25, "all", 1.25)
    assert found.base["family"] == wanted.base["family"]


def test_a_checkpoint_made_with_our_aliases(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The guide's script, run with clipgraft's functions of the same names, saves what nobody reads."""
    cg.apply_lora_to_text_encoder(tiny_openclip, r=4, lora_alpha=8)
    updates = randomise_lora(tiny_openclip)
    config = {"model": "ViT-B-32", "pretrained": "openai", "r": 4, "alpha": 8, "dropout": 0.1}
    torch.save(
        {"lora_state_dict": cg.get_lora_state_dict(tiny_openclip), "lora_config": config}, tmp_path / "a.pt"
    )
    found = updates_of(read_any(tmp_path / "a.pt"))
    assert found.keys() == updates.keys()
    assert all(torch.equal(found[s][i], updates[s][i]) for s in updates for i in (0, 1))
    assert {scale for *_, scale in found.values()} == {2}


def test_sites_the_guide_has_not(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """Updates of other sites vanish without a word."""
    adapter = adapter_of(tiny_openclip, tmp_path, targets="text.*.q+fc1,vision.0.out,text.proj")
    with pytest.raises(
        cg.errors.AdapterError, match=r"not text\.0\.fc1, text\.1\.fc1, text\.proj, vision\.0\.out;"
    ):
        write_guide(adapter, tmp_path / "lora.pt")
    unnamed = AdapterFile(**{**vars(adapter_of(tiny_openclip, tmp_path)), "base": {}})
    with pytest.raises(cg.errors.AdapterError, match=r"does not name its base.*`model`"):
        write_guide(unnamed, tmp_path / "lora.pt")
    assert not (tmp_path / "lora.pt").exists()


def valid() -> dict[str, Any]:
    """A small file of the guide, full and LoRA-only in one, with clipgraft's own entry."""
    name = "transformer.resblocks.{}.lora_{}.lora_{}"
    state = {name.format(i, letter, "A"): torch.ones(2, 32) for i in (0, 1) for letter in ("q", "out")}
    state |= {name.format(i, letter, "B"): torch.ones(32, 2) for i in (0, 1) for letter in ("q", "out")}
    config = {"model": "m", "pretrained": "p", "r": 2, "alpha": 4, "dropout": 0.1, "rank_pattern": {}}
    own = {
        "base": {},
        "fingerprint": "f",
        "logit_scale": 1.0,
        "metrics": {},
        "targets": "t",
        "ranks": {"text.0.q": 1},
    }
    return {"state_dict": {**state, "logit_scale": torch.ones(())}, "lora_config": config, "clipgraft": own}


@settings(max_examples=300)
@given(data=damaged(valid()))
def test_damaged_files(data: Any) -> None:
    """A damaged or hostile file ends in a traceback instead of one line."""
    if not isinstance(data, dict):
        return
    adapter = read_or_one_line(lambda: read_guide(data, Path("x.pt")), "x.pt")
    if adapter is not None:
        assert all(a.shape[0] == b.shape[1] and a.dtype == torch.float32 for a, b in adapter.weights.values())
        updates_of(adapter)


@given(names=st.lists(st.text(max_size=40), max_size=3), depth=st.integers(0, 10**12))
def test_strange_names(names: list[str], depth: int) -> None:
    """A weight with a name of no site is dropped, or breaks the reader."""
    weights: dict[str, Tensor] = {f"{name}.lora_A": torch.ones(2, 4) for name in names}
    weights |= {f"transformer.resblocks.{depth}.lora_q.lora_{p}": torch.ones(4, 4) for p in "AB"}
    data = {"lora_state_dict": weights, "lora_config": {"r": 4, "alpha": 4}}
    if names or depth >= 10**9:
        with pytest.raises(cg.errors.AdapterError, match="belong to no site"):
            read_guide(data, Path("x.pt"))
    else:
        assert [site.block for site in read_guide(data, Path("x.pt")).weights] == [depth]
