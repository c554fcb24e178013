"""`clipgraft inspect`: what a model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg

COMPACT = (
    *("--set", "text_config.num_hidden_layers=3", "--set", "vision_config.num_hidden_layers=3"),
    *("--set", "text_config.vocab_size=4940"),
)


@pytest.fixture
def b32(tmp_path: Path) -> Path:
    """The configuration of openai/clip-vit-base-patch32, as bare as it can be."""
    path = tmp_path / "cấu hình.json"
    path.write_text('{"model_type": "clip", "text_config": {}, "vision_config": {}}')
    return path


def test_the_compact_clip(b32: Path, cli: Any) -> None:
    """The documented command does not give the documented model."""
    outcome = cli("inspect", b32, *COMPACT, "--depth", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Total params: 36,347,393" in outcome.out
    assert "(0-2): 3 x CLIPEncoderLayer(" in outcome.out
    assert '"vocab_size": 4940' in outcome.out
    assert "ModuleList: 3-6" in outcome.out
    assert "Embedding: 3-1" in outcome.out
    assert "6-1 " not in outcome.out
    assert "vision.0-2.fc1" in outcome.out


def test_target_sets_and_ranks(cli: Any) -> None:
    """The size of an adapter before training is another one than after."""
    outcome = cli("inspect", "ViT-B/32", "--targets", "text.*.q,v;text-attention", "--lora-r", 16)
    rows = [line.split() for line in outcome.out.split("target sets\n")[1].splitlines()]
    assert rows[1] == ["text.*.q,v", "16", "24", "393,216", "1.57", "0.26%"]
    assert rows[2] == ["text-attention", "16", "48", "786,432", "3.15", "0.52%"]
    assert len(rows) == 3


def test_json_and_markdown(b32: Path, cli: Any) -> None:
    """Other programs cannot read what is printed."""
    document = json.loads(cli("inspect", b32, *COMPACT, "--format", "json").out)
    assert document["library"] == "transformers"
    assert document["config"]["text_config"]["vocab_size"] == 4940
    assert document["profile"]["parameters"] == 36_347_393
    assert document["profile"]["layers"][0]["parameters"] == 36_347_393
    assert document["profile"]["layers"][-1]["path"] == "text_projection"
    assert {site["site"] for site in document["sites"]} == set(map(str, clip_sites()))
    markdown = cli("inspect", b32, *COMPACT, "--format", "markdown").out
    assert markdown.startswith("# ")
    assert "## target sets\n\n| targets |" in markdown


def clip_sites() -> list[cg.models.Site]:
    blocks = [f"{tower}.{n}.{role}" for tower in ("text", "vision") for n in range(3) for role in ROLES]
    outside = ("text.token_embedding", "vision.patch_embedding")
    both = [f"{tower}.{role}" for tower in ("text", "vision") for role in ("position_embedding", "proj")]
    return [cg.models.Site.parse(name) for name in (*blocks, *outside, *both)]


ROLES = ("q", "k", "v", "out", "fc1", "fc2")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "MODEL is missing"),
        (["ViT-B-31"], "no model 'ViT-B-31'"),
        (["emoji", "--set", "text_config.layers=3"], "did you mean text_config.num_hidden_layers"),
        (["emoji", "--set", "text_config"], "--set: got"),
        (["emoji", "--targets", "text-atention"], "near misses: text-attention"),
        (
            ["emoji", "--format", "html"],
            "--format: got 'html', allowed is one of 'text', 'json' or 'markdown'",
        ),
    ],
)
def test_faults(words: list[str], told: str, cli: Any) -> None:
    """A slip ends in a traceback instead of one line."""
    outcome = cli("inspect", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_an_adapter(cli: Any, tiny_config: Path, tmp_path: Path) -> None:
    """What an adapter file is cannot be seen without its base, or it is taken for a broken model."""
    clip = cg.load(tiny_config, "none")
    cg.apply_lora(clip, r=2, alpha=8, dropout=0.25, targets="text.*.q,v", rank_pattern={"text.0.q": 4})
    folder = cg.save_adapter(clip, tmp_path / "adapter", {"text_to_image_R@1": 0.5})
    outcome = cli("inspect", folder)
    assert (outcome.code, outcome.err) == (0, "")
    for line in (
        str(folder),
        f"base: {tiny_config} / none, fingerprint {clip.fingerprint}",
        "rank: 2",
        "alpha: 8",
        "dropout: 0.25",
        "targets: text.*.q,v",
        "measured text_to_image_R@1: 0.5",
    ):
        assert line in outcome.out.splitlines(), line
    rows = [line.split() for line in outcome.out.split("\nsites\n")[1].splitlines()[1:]]
    shape = "32x32"
    assert sorted(rows) == [
        ["text.0-1.v", "2", "2", "4", shape, "256"],
        ["text.0.q", "1", "4", "2", shape, "256"],
        ["text.1.q", "1", "2", "4", shape, "128"],
    ]
    document = json.loads(cli("inspect", folder, "--format", "json").out)
    weights = sum(parameter.numel() for name, parameter in clip.model.named_parameters() if "lora_" in name)
    assert document["parameters"] == weights == sum(site["parameters"] for site in document["sites"])
    assert document["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    guide = tmp_path / "guide.pt"
    assert cli("convert", folder, guide, "--to", "guide").code == 0
    assert "format: guide\nbase: " in cli("inspect", guide).out
    refused = cli("inspect", folder, "--depth", 2)
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_runs(cli: Any, train: Any, tmp_path: Path) -> None:
    """A run is named to every command but the two that look at models."""
    assert train("--use-lora", "--lora-r", 2, "--name", "lora").code == 0
    assert train("--name", "full").code == 0
    logs = tmp_path / "logs"
    assert "rank: 2" in cli("inspect", logs / "lora").out
    assert "model of open_clip" in cli("inspect", logs / "full").out
    costs = {name: cli("profile", logs / name) for name in ("lora", "full")}
    assert all((outcome.code, outcome.err) == (0, "") for outcome in costs.values())
    assert costs["lora"].out != costs["full"].out, "the adapter costs something"
