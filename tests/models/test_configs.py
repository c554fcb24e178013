"""A model's configuration decides how the model is built, and nothing else: no code, no other place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, RobertaConfig, SiglipConfig

import clipgraft as cg
from clipgraft.models.configs import openclip_config, transformers_config
from tiny_models import TINY_OPENCLIP


def refused(folder: Path, key: str, value: Any) -> str:
    """The message for a JSON config with one more setting at a dotted path; one line that names the file."""
    config: dict[str, Any] = {"model_cfg": copy.deepcopy(TINY_OPENCLIP), "preprocess_cfg": {}}
    *parts, leaf = key.split(".")
    inner = config
    for part in parts:
        inner = inner.setdefault(part, {})
    inner[leaf] = value
    path = folder / "model.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(cg.errors.ModelError) as caught:
        cg.load(path, "none")
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


CODE = {
    "model_cfg.text_cfg.tokenizer_kwargs": {"trust_remote_code": True},
    "model_cfg.text_cfg.trust_remote_code": True,
    "model_cfg.auto_map": {"AutoModel": "own.Own"},
    "model_cfg.custom_objects": {"a": "b"},
}


@pytest.mark.parametrize("key", CODE)
def test_code_is_refused(tmp_path: Path, key: str) -> None:
    """A configuration runs the Python code that lies beside it."""
    assert "never run" in refused(tmp_path, key, CODE[key])


OTHERS: dict[str, Any] = {
    "model_cfg.text_cfg.tokenizer_kwargs": {"bpe_path": "/etc/passwd"},
    "model_cfg.vision_cfg.timm_model_name": "hf-hub:owner/name",
    "model_cfg.vision_cfg.timm_model_name ": "local-dir:/tmp",
    "model_cfg.text_cfg.hf_model_name": "../../elsewhere",
    "model_cfg.text_cfg.act_kwargs": {"approximate": "often"},
    "model_cfg.text_cfg.norm_kwargs": {"device": "meta"},
    "model_cfg.text_cfg.norm_kwargs ": {"eps": "small"},
    "model_cfg.vision_cfg.layers": 10**9,
    "model_cfg.vision_cfg.width": [[1]],
    "model_cfg.text_cfg.heads": 10**40,
    "model_cfg.cast_dtype": "float16",
    "preprocess_cfg.mean": ["a", "b", "c"],
    "preprocess_cfg.size": {"height": 3},
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_settings_are_refused(tmp_path: Path, key: str) -> None:
    """A setting that open_clip does not know, or of a wrong type, ends in a traceback or is handed on."""
    last = {"mean": "preprocessing"}.get(name := key.strip().rpartition(".")[2], name)
    assert last in refused(tmp_path, key.strip(), OTHERS[key])


def test_text_towers_with_code(tmp_path: Path) -> None:
    """A text tower of transformers brings its own code, or a kernel of the hub, past the check."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}')
    assert "never run" in refused(tmp_path, "model_cfg.text_cfg.hf_model_name", str(own))
    RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(own)
    values = json.loads((own / "config.json").read_text(encoding="utf-8"))
    (own / "config.json").write_text(json.dumps({**values, "_attn_implementation": "owner/kernel"}))
    assert "code of the hub" in refused(tmp_path, "model_cfg.text_cfg.hf_model_name", str(own))


def test_open_clips_own_configurations() -> None:
    """A model that open_clip ships with is refused, or built with other settings."""
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert openclip_config(config, name) == config


def test_transformers_configurations() -> None:
    """A transformers folder is built with other settings than its config.json says, or with its kernels."""
    config = CLIPConfig(text_config={"hidden_size": 48, "num_attention_heads": 4}, projection_dim=40)
    values = config.to_dict()
    kept = transformers_config(
        CLIPConfig, {**values, "auto_map": {"AutoModel": "a.B"}, "use_kernels": True}, "here"
    ).to_dict()
    assert {key: kept[key] for key in values} == values
    assert "auto_map" not in kept
    hostile = {
        **values,
        "_attn_implementation": "owner/kernel",
        "text_config": {"attn_implementation": "a/b"},
    }
    built = transformers_config(CLIPConfig, hostile, "here")
    assert "/" not in f"{built._attn_implementation} {built.text_config._attn_implementation}"
    siglip = SiglipConfig().to_dict()
    assert transformers_config(SiglipConfig, siglip, "here").to_dict() == siglip
    with pytest.raises(cg.errors.ModelError, match="text_config is list of 1"):
        transformers_config(CLIPConfig, {"text_config": [1]}, "here")


def test_early_repositories(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """`text_config_dict`, as the first CLIP repositories have it, is dropped and the default sizes taken."""
    text = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = transformers_config(CLIPConfig, {"text_config": None, "text_config_dict": text}, "here")
    with torch.device("meta"):
        assert CLIPModel(config).text_model.embeddings.token_embedding.weight.shape[1] == 48
