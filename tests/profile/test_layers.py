"""The layer table and the structure, against the published ones and torch's own print."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.meta import clip_on_meta
from clipgraft.profile.forward import costs
from clipgraft.profile.tables import layer_table, structure
from clipgraft.profile.trace import trace

# The published table of the compact CLIP: 3 layers a tower, 4,940 tokens.
COMPACT = """
CLIPModel 1
CLIPTextEmbeddings: 2-1 --
Embedding: 3-1 2,529,280
Embedding: 3-2 39,424
CLIPEncoder: 2-2 --
ModuleList: 3-3 9,457,152
LayerNorm: 2-3 1,024
CLIPVisionEmbeddings: 2-4 768
Conv2d: 3-4 2,359,296
Embedding: 3-5 38,400
LayerNorm: 2-5 1,536
CLIPEncoder: 2-6 --
ModuleList: 3-6 21,263,616
LayerNorm: 2-7 1,536
Linear: 1-3 393,216
Linear: 1-4 262,144
""".strip().splitlines()


@pytest.fixture(scope="module")
def b32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of openai/clip-vit-base-patch32."""
    from transformers import CLIPConfig

    folder = tmp_path_factory.mktemp("b32")
    CLIPConfig(text_config={}, vision_config={}).save_pretrained(folder)
    return folder / "config.json"


def compact(path: Path) -> dict[str, object]:
    return {
        "text_config.num_hidden_layers": 3,
        "vision_config.num_hidden_layers": 3,
        "text_config.vocab_size": 4940,
    }


def rows(table: str) -> dict[str, list[str]]:
    body = table.split("=\n")[2].splitlines()
    cells = [re.split(r"\s{2,}", line.lstrip("│└├─ ")) for line in body if not line.startswith("=")]
    return {row[0]: row[1:] for row in cells}


def test_the_published_table_of_the_compact_clip(b32: Path) -> None:
    """The compact model of the documentation comes out with other layers or another size."""
    profile = costs(clip_on_meta(b32, compact(b32)))
    assert profile.parameters == 36_347_393
    table = layer_table(profile.trace, depth=3)
    found = rows(table)
    for line in COMPACT:
        name, _, count = line.rpartition(" ")
        assert found[name][2] == count, name
    assert "Total params: 36,347,393\nTrainable params: 36,347,393\nNon-trainable params: 0" in table
    assert f"Params size (MB): {36_347_393 * 4 / 1e6:.2f}" in table
    assert found["Conv2d: 3-4"] == [
        *("[1, 3, 224, 224]", "[1, 768, 7, 7]", "2,359,296", "6.49%", "[32, 32]"),
        *(f"{49 * 3 * 32 * 32 * 768:,}", "True"),
    ]


@pytest.mark.parametrize("depth", [0, 1, 3, None])
def test_columns_add_up(tiny_openclip: nn.Module, depth: int | None) -> None:
    """Weights or products are missing from the table, or in two of its rows, at some depth."""
    profile = costs(tiny_openclip)
    body = list(rows(layer_table(profile.trace, depth)).values())
    for column, total in ((2, profile.parameters), (5, profile.macs)):
        numbers = [row[column].strip("()").replace(",", "") for row in body]
        assert sum(int(number) for number in numbers if number != "--") == total


def test_frozen_weights_are_marked(tiny_hf: nn.Module) -> None:
    """The table says that the base trains while only an adapter does."""
    cg.apply_lora(tiny_hf, r=4, targets="text.0.q")
    found = rows(layer_table(costs(tiny_hf).trace, depth=2))
    assert found["CLIPEncoder: 2-2"][-1] == "Partial"
    assert found["CLIPEncoder: 2-6"][-1] == "False"
    assert found["CLIPEncoder: 2-6"][2].startswith("(")


def test_structure_is_torchs_own_print(tiny_hf: nn.Module) -> None:
    """The structure leaves out or renames modules."""
    lines = structure(tiny_hf).splitlines()
    assert "\n".join(line for line in lines if "): Parameter(" not in line) == repr(tiny_hf)
    assert "      (class_embedding): Parameter(32)" in lines
    assert "        (0-1): 2 x CLIPEncoderLayer(" in lines


def test_structure_folds_and_shows_raw_parameters() -> None:
    """Twelve equal blocks fill pages, or weights without a module of their own do not appear."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    lines = [line.strip() for line in structure(model).splitlines()]
    assert lines.count("(0-11): 12 x ResidualAttentionBlock(") == 2
    for raw in (
        "(proj): Parameter(768, 512)",
        "(in_proj_weight): Parameter(2304, 768)",
        "(logit_scale): Parameter()",
    ):
        assert raw in lines
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    folded = structure(nn.Sequential(block, nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU(), nn.ReLU()))
    assert folded.splitlines()[1] == "  (0-1): 2 x Sequential("
    assert folded.splitlines()[-2] == "  (2-3): 2 x ReLU()"


def test_names_tell_modules_apart(tiny_hf: nn.Module) -> None:
    """Modules that only look alike from outside are folded into one, and one of them disappears."""
    text = structure(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 3)]))
    assert text.splitlines()[1:3] == [
        "  (0): Linear(in_features=2, out_features=2, bias=True)",
        "  (1-2): 2 x Linear(in_features=2, out_features=3, bias=True)",
    ]


def test_a_model_that_never_ran(tiny_hf: nn.Module) -> None:
    """The table of a model of which one part is not used fails instead of leaving its cells empty."""
    clip = as_clip(tiny_hf)
    images = torch.zeros(1, 3, 32, 32)
    found = rows(layer_table(trace(clip.model, images, call=clip.family.encode_image), depth=1))
    text = next(row for name, row in found.items() if name.startswith("CLIPText"))
    assert text[:2] == ["--", "--"]
    assert text[5] == "--"
