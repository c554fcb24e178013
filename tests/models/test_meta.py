"""Models built on the meta device from names and configurations, against the same models with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import clipgraft as cg
from clipgraft.models.meta import build_model, clip_on_meta, read_model_config
from tiny_models import TINY_OPENCLIP


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def assert_twins(clip: cg.Clip, loaded: cg.Clip) -> None:
    assert all(weight.is_meta for weight in (*clip.model.parameters(), *clip.model.buffers()))
    assert type(clip.model) is type(loaded.model)
    assert shapes(clip.model) == shapes(loaded.model)
    assert clip.sites == loaded.sites
    assert clip.context_length == loaded.context_length


def test_emoji() -> None:
    """`clipgraft inspect emoji` describes another model than the one that is loaded by that name."""
    assert_twins(clip_on_meta("emoji"), cg.load("emoji"))


def test_transformers_folders(hf_folder: Path) -> None:
    """A folder, `hf:` and the folder, or its bare config.json give another model than the folder's."""
    loaded = cg.load(hf_folder)
    for name in (hf_folder, f"hf:{hf_folder}", hf_folder / "config.json"):
        clip = clip_on_meta(name)
        assert_twins(clip, loaded)
        assert clip.source.name == str(name)


def test_openclip_configs_and_folders(tiny_config: Path, tmp_path: Path) -> None:
    """An open_clip JSON config, or a folder with one, gives another model than loading it does."""
    loaded = cg.load(tiny_config, "none")
    assert_twins(clip_on_meta(tiny_config), loaded)
    both = {"model_cfg": TINY_OPENCLIP, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(both))
    assert_twins(clip_on_meta(tmp_path), loaded)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32"])
def test_openclip_names(name: str) -> None:
    """open_clip's own models need weights or a download to be looked at."""
    assert sum(p.numel() for p in clip_on_meta(name).model.parameters()) == 151_277_313


def test_overrides(hf_folder: Path, tiny_config: Path) -> None:
    """`--set` changes nothing, or the file it was read from."""
    before = (hf_folder / "config.json").read_bytes()
    clip = clip_on_meta(hf_folder, {"text_config.num_hidden_layers": 1, "vision_config.image_size": 16})
    assert clip.family.image_size(clip.model) == (16, 16)
    assert {site.block for site in clip.sites if site.tower == "text"} == {None, 0}
    assert (hf_folder / "config.json").read_bytes() == before
    # open_clip's file does not name this setting.
    config = read_model_config(tiny_config, {"text_cfg.mlp_ratio": 2.0, "embed_dim": 8})
    assert config.values["text_cfg"]["mlp_ratio"] == 2.0
    refs = {
        str(site): ref.shape for site, ref in clip_on_meta(tiny_config, {"embed_dim": 8}).site_refs.items()
    }
    assert refs["text.proj"] == (8, 32)


def test_tags_decide_on_the_activation() -> None:
    """The structure of OpenAI's own models shows another activation than they have."""
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False), (None, False)):
        text = repr(clip_on_meta("ViT-B-32", {"text_cfg.layers": 1, "vision_cfg.layers": 1}, tag).model)
        assert ("QuickGELU" in text) == quick


def test_random_weights_on_a_real_device(hf_folder: Path, tiny_config: Path) -> None:
    """`profile --measure` runs a model without numbers in it, or of another shape."""
    for name in (hf_folder, tiny_config):
        clip = build_model(read_model_config(name), "cpu")
        assert not any(weight.is_meta for weight in clip.model.state_dict().values())
        assert shapes(clip.model) == shapes(clip_on_meta(name).model)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ViT-B-31", {}, r"no model 'ViT-B-31'.*ViT-B-32"),
        ("missing.json", {}, "missing.json: there is no such file"),
        ("weights.pt", {}, "does not say which architecture"),
        ("hf:", {}, "names no model"),
        ("hf:./nowhere", {}, "no such folder"),
        (
            "emoji",
            {"text_config.num_hidden_layer": 1},
            r"no setting.*did you mean text_config.num_hidden_layers",
        ),
        ("emoji", {"text_config.zzz": 1}, r"no setting 'text_config.zzz'; there are text_config\."),
        ("emoji", {"text_config.layers": 1}, r"did you mean text_config.num_hidden_layers"),
        ("emoji", {"text_conf.layers": 1}, r"did you mean text_config.num_hidden_layers"),
        ("ViT-B-32", {"text_cfg.layer": 1}, r"did you mean text_cfg.layers"),
        ("emoji", {"text_config.hidden_size": 33}, "no model can be built"),
        ("ViT-B-32", {"text_cfg.heads": 7}, "no model can be built"),
    ],
)
def test_faults(name: str, overrides: dict[str, Any], message: str) -> None:
    """A slip in a name or a setting ends in a traceback, or in a model that was not meant."""
    with pytest.raises(cg.errors.ModelError, match=message) as caught:
        clip_on_meta(name, overrides)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["[1]", "{", '{"model_type": "bert"}', '{"model_type": "nothing"}'])
def test_configs_of_something_else(content: str, tmp_path: Path) -> None:
    """A JSON file that is no CLIP configuration ends in a traceback."""
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(cg.errors.ModelError) as caught:
        clip_on_meta(path)
    assert len(str(caught.value).splitlines()) == 1


def test_adapters_without_weights(hf_folder: Path) -> None:
    """What an adapter costs can be found out for models only that fit into memory."""
    clip = clip_on_meta(hf_folder)
    loaded = cg.load(hf_folder)
    for model in (clip, loaded):
        cg.apply_lora(model, r=4, targets="all", use_dora=True)
    assert shapes(clip.model) == shapes(loaded.model)
    assert all(weight.is_meta for weight in clip.model.parameters())
    assert cg.count_parameters(clip) == cg.count_parameters(loaded)
