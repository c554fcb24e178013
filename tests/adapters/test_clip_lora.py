"""Files of MaxZanella/CLIP-LoRA: its own loading rule runs what we write, and we read what it saves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.adapter_file import AdapterFile, parts_of
from clipgraft.adapters.clip_lora import read_clip_lora, write_clip_lora
from clipgraft.adapters.convert import read_any
from clipgraft.lora.inject import LoraConfig
from clipgraft.models.sites import Site
from damaged_values import damaged, read_or_one_line
from explicit_lora import explicit_model, features, inputs, largest, randomise_lora
from guide_lora import deltas, updates_of

MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
# What CLIP-LoRA's tables say, for the text tower and for the vision tower of each backbone it takes.
BLOCKS = {
    "bottom": [0, 1, 2, 3],
    "mid": [4, 5, 6, 7],
    "up": [8, 9, 10, 11],
    "half-up": [6, 7, 8, 9, 10, 11],
    "half-bottom": [0, 1, 2, 3, 4, 5],
    "top3": [9, 10, 11],
    "all": list(range(12)),
}
LARGE = {"half-up": list(range(12, 24)), "half-bottom": list(range(12)), "all": list(range(24))}
WIDTHS = {"ViT-B/32": (512, 768), "ViT-L/14": (768, 1024)}


def file_of(
    layers: list[int],
    params: str = "qkv",
    r: int = 2,
    alpha: float = 1,
    encoder: str = "both",
    position: str = "all",
) -> dict[str, Any]:
    """What CLIP-LoRA saves for attention modules of these widths, numbered as it numbers them."""
    torch.manual_seed(0)
    weights = {
        f"layer_{i}": {
            MODULES[p]: {"w_lora_A": torch.randn(r, width), "w_lora_B": torch.randn(width, r)} for p in params
        }
        for i, width in enumerate(layers)
    }
    metadata = {"r": r, "alpha": alpha, "encoder": encoder, "params": list(params), "position": position}
    return {"weights": weights, "metadata": metadata}


def places(backbone: str, encoder: str, position: str) -> list[tuple[str, int]]:
    """Tower and block of every layer, by CLIP-LoRA's tables."""
    vision = (LARGE if backbone == "ViT-L/14" else BLOCKS).get(
        position, []
    )  # no such one: a text tower alone
    text = [("text", block) for block in BLOCKS[position]] * (encoder != "vision")
    return text + [("vision", block) for block in vision] * (encoder != "text")


CASES = [
    (backbone, encoder, position)
    for backbone in WIDTHS
    for encoder in ("text", "vision", "both")
    for position in (LARGE if backbone == "ViT-L/14" and encoder != "text" else BLOCKS)
]


@pytest.mark.parametrize(("backbone", "encoder", "position"), CASES)
def test_which_layer_is_which(backbone: str, encoder: str, position: str, tmp_path: Path) -> None:
    """Updates of one block are put on another, or on the other tower."""
    wanted = places(backbone, encoder, position)
    text_width, vision_width = WIDTHS[backbone]
    widths = [text_width if tower == "text" else vision_width for tower, _ in wanted]
    data = file_of(widths, "qo", encoder=encoder, position=position)
    torch.save(data, tmp_path / "lora_weights.pt")
    adapter = read_any(tmp_path / "lora_weights.pt")
    assert [str(site) for site in adapter.weights] == [
        f"{t}.{b}.{role}" for t, b in wanted for role in ("q", "out")
    ]
    for index, (tower, block) in enumerate(wanted):
        for role, module in (("q", "q_proj"), ("out", "proj")):
            saved, found = (
                data["weights"][f"layer_{index}"][module],
                adapter.weights[Site(tower, block, role)],
            )
            assert torch.equal(found[0], saved["w_lora_A"])
            assert torch.equal(found[1], saved["w_lora_B"])
    if position != "top3":
        path = write_clip_lora(adapter, tmp_path / "again.pt")
        again = torch.load(path, weights_only=True)
        assert again["metadata"] == data["metadata"]
        assert list(again["weights"]) == list(data["weights"])
        for name, layer in data["weights"].items():
            for module, pair in layer.items():
                assert all(torch.equal(again["weights"][name][module][part], w) for part, w in pair.items())


def load_as_clip_lora(base: nn.Module, path: Path) -> nn.Module:
    """CLIP-LoRA's `apply_lora`, `load_lora` and merge on a model of 2 + 2 blocks: W + α/√r·B·A."""
    saved = torch.load(path, weights_only=True)
    metadata, updates = saved["metadata"], {}
    towers = {"both": ("text", "vision")}.get(metadata["encoder"], (metadata["encoder"],))
    listed = [(t, b) for t in towers for b in range(2) if b in BLOCKS[metadata["position"]]]
    assert isinstance(metadata["alpha"], int)
    for index, (tower, block) in enumerate(listed):
        layer = saved["weights"][f"layer_{index}"]
        for letter in metadata["params"]:
            if MODULES[letter] in layer:
                pair = layer[MODULES[letter]]
                assert pair["w_lora_A"].shape == (metadata["r"], 32)
                scale = metadata["alpha"] / math.sqrt(metadata["r"])
                role = {"o": "out"}.get(letter, letter)
                updates[f"{tower}.{block}.{role}"] = (pair["w_lora_A"], pair["w_lora_B"], scale)
    return explicit_model(base, updates)


OPTIONS: dict[str, dict[str, Any]] = {
    "its own kind": {"r": 4, "alpha": 3, "use_rslora": True, "targets": "attention"},
    "alpha/r": {"r": 2, "alpha": 3, "targets": "*.*.q+v"},
    "text": {"r": 4, "alpha": 4, "targets": "text.*.out"},
    "vision": {"r": 4, "alpha": 4, "targets": "vision.*.k"},
    "holes": {"r": 4, "alpha": 5, "targets": "text.1.q,vision.0.v"},
    "mixed": {
        "r": 3,
        "alpha": 0.7,
        "targets": "attention",
        "rank_pattern": {"text.0.*": 5},
        "alpha_pattern": {"vision.*.q": 9},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_clip_lora_loads_what_we_write(name: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """An adapter handed to a colleague who uses CLIP-LoRA computes something else there."""
    base = tiny_openclip
    cg.apply_lora(base, **OPTIONS[name])
    randomise_lora(base)
    adapter = cg.read_adapter(cg.save_adapter(base, tmp_path / "a", {"acc1": 0.5}))
    cg.remove_lora(base)
    path = write_clip_lora(adapter, tmp_path / "lora.pt", text_layers=2, vision_layers=2)
    sample = inputs(base)
    wanted = features(explicit_model(base, updates_of(adapter)), *sample)
    assert largest(features(load_as_clip_lora(base, path), *sample), wanted) < 1e-5
    assert largest(features(base, *sample), wanted) > 0.01
    again = read_any(path, text_layers=2, vision_layers=2)
    assert again.weights.keys() == adapter.weights.keys()
    for site, delta in deltas(adapter).items():
        assert (deltas(again)[site] - delta).abs().max() <= 2**-22 * delta.abs().max()
        assert torch.equal(again.weights[Site.parse(site)][0], adapter.weights[Site.parse(site)][0])
    for field in ("base", "fingerprint", "logit_scale", "metrics"):
        assert getattr(again, field) == getattr(adapter, field)


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    """CLIP-LoRA trains on fp16 bases; its weights must not be rounded again."""
    data = file_of([512] * 4, "q", encoder="text", position="mid")
    data["weights"] = {
        n: {"q_proj": {k: v.half() for k, v in d["q_proj"].items()}} for n, d in data["weights"].items()
    }
    adapter = read_clip_lora(data, tmp_path / "x.pt")
    a, b = adapter.weights[Site("text", 4, "q")]
    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
    assert torch.equal(a, data["weights"]["layer_0"]["q_proj"]["w_lora_A"].float())
    assert adapter.settings.use_rslora


def test_towers_of_one_width(tmp_path: Path) -> None:
    """Layers of two towers of equal width are shared out by guessing."""
    data = file_of([64] * 7)
    with pytest.raises(cg.errors.AdapterError, match=r"7 layers and does not tell.*`text_layers=N`"):
        read_clip_lora(data, tmp_path / "x.pt")
    for given_depth in ({"text_layers": 3}, {"vision_layers": 4}, {"text_layers": 3, "vision_layers": 4}):
        adapter = read_clip_lora(data, tmp_path / "x.pt", **given_depth)
        assert [len({s.block for s in adapter.weights if s.tower == t}) for t in ("text", "vision")] == [3, 4]
    whole = read_clip_lora(file_of([64] * 24), tmp_path / "x.pt")
    assert sum(site.tower == "text" for site in whole.weights) == 12 * 3


@pytest.mark.parametrize(
    ("change", "depths"),
    [
        ({"layers": [512] * 5, "encoder": "text", "position": "mid"}, {}),
        ({"layers": [512] * 12 + [768] * 12, "encoder": "text"}, {}),
        ({"layers": [512] * 12 + [768] * 12}, {"text_layers": 11}),
        ({"layers": [512] * 12 + [768] * 12}, {"text_layers": 12, "vision_layers": 6}),
        ({"layers": [512, 768, 512]}, {"text_layers": 1}),
    ],
)
def test_layers_that_do_not_fit(change: dict[str, Any], depths: dict[str, int], tmp_path: Path) -> None:
    """A file whose layers are not those its metadata names is read all the same."""
    with pytest.raises(cg.errors.AdapterError, match="are not those of position"):
        read_clip_lora(file_of(**change), tmp_path / "x.pt", **depths)


def handmade(sites: list[str], width: int = 32) -> AdapterFile:
    weights: dict[Site, tuple[Tensor, Tensor]] = {
        Site.parse(site): (torch.ones(2, width), torch.ones(width, 2)) for site in sites
    }
    return AdapterFile(Path("handmade"), parts_of(weights), LoraConfig(r=2, alpha=2))


def test_sites_clip_lora_has_not(tmp_path: Path) -> None:
    """Updates that CLIP-LoRA cannot hold, or would never load, vanish without a word."""
    with pytest.raises(cg.errors.AdapterError, match=r"not text\.proj, text\.0\.fc1, vision\.3\.fc2;"):
        write_clip_lora(handmade(["text.0.q", "text.proj", "text.0.fc1", "vision.3.fc2"]), tmp_path / "x.pt")
    deep = handmade([f"text.{block}.q" for block in range(14)])
    with pytest.raises(
        cg.errors.AdapterError, match=r"first 12 text and .*, and not text\.12\.q, text\.13\.q;"
    ):
        write_clip_lora(deep, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    path = write_clip_lora(deep, tmp_path / "x.pt", text_layers=14)
    assert read_any(path).weights.keys() == deep.weights.keys()


def test_files_of_before_september_2024(tmp_path: Path) -> None:
    """Older files on ViT-L/14, whose positions named other blocks, are put on the blocks of today."""
    data = file_of([768] * 12 + [1024] * 21, "q")
    found = read_clip_lora(data, tmp_path / "x.pt").weights
    assert [s.block for s in found if s.tower == "vision"] == list(range(21))
    data = file_of([768] * 6 + [1024] * 6, "q", position="half-up")
    found = read_clip_lora(data, tmp_path / "x.pt").weights
    assert [s.block for s in found if s.tower == "vision"] == list(range(6, 12))


def valid() -> dict[str, Any]:
    own = {
        "base": {},
        "fingerprint": None,
        "logit_scale": None,
        "metrics": {},
        "targets": "t",
        "ranks": {"text.0.q": 1},
    }
    return {**file_of([32, 32, 48], "qo"), "clipgraft": own}


@settings(max_examples=300)
@given(data=damaged(valid()))
def test_damaged_files(data: Any) -> None:
    """A damaged or hostile file ends in a traceback instead of one line."""
    if not isinstance(data, dict):
        return
    adapter = read_or_one_line(lambda: read_clip_lora(data, Path("x.pt")), "x.pt")
    if adapter is not None:
        assert all(a.shape[0] == b.shape[1] and a.dtype == torch.float32 for a, b in adapter.weights.values())
        updates_of(adapter)
