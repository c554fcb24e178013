"""`clipgraft profile`: what a model costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.models.load import load
from clipgraft.profile import measure as measuring
from clipgraft.profile.forward import costs
from clipgraft.profile.training import training_costs

JSON = ("--format", "json", "--targets", "mlp")


def test_the_report(cli: Any, tiny_config: Path) -> None:
    """A part of the report is missing, or of another batch than asked for."""
    outcome = cli("profile", tiny_config, "--batch-size", 2, "--text-tokens", 9, "--depth", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert "100% Params" in outcome.out
    assert "(visual): VisionTransformer(" in outcome.out
    for line in ("forward pass, batch 2", "a training step, batch 2", " 2x9 ", "vision.0-1.fc1"):
        assert line in outcome.out
    assert "measured" not in outcome.out


def test_json_is_what_the_library_says(cli: Any, tiny_config: Path) -> None:
    """The command's numbers differ from those of the library's functions."""
    document = json.loads(
        cli("profile", tiny_config, "--format", "json", "--lora-r", 4, "--targets", "mlp").out
    )
    clip = load(tiny_config, "none")
    profile = costs(clip)
    assert document["profile"]["macs"] == profile.macs
    assert document["profile"]["vision"]["flops"] == profile.vision.flops
    assert document["profile"]["text"]["sites"][2]["site"] == "text.0.q"
    assert sum(layer["own_macs"] for layer in document["profile"]["layers"]) == profile.macs
    training = training_costs(clip, ("mlp",), r=4)
    assert [cost["targets"] for cost in document["training"]] == ["full", "mlp"]
    assert [cost["macs"] for cost in document["training"]] == [cost.macs for cost in training]
    assert document["measured"] is None


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_an_adapter(family: str, cli: Any, tiny_config: Path, hf_folder: Path, tmp_path: Path) -> None:
    """An adapter's own cost cannot be found out without its base's weights."""
    name = str(tiny_config) if family == "open_clip" else str(hf_folder)
    clip = load(tiny_config, "none") if family == "open_clip" else load(hf_folder)
    cg.apply_lora(clip, r=4, targets="linear", dropout=0.1)
    cg.save_adapter(clip, tmp_path / "adapter")
    found = json.loads(cli("profile", name, "--adapter", tmp_path / "adapter", *JSON).out)
    profile = costs(clip)
    for tower in profile.towers:
        assert found["profile"][tower.tower]["adapter_macs"] == tower.adapter_macs > 0
        assert found["profile"][tower.tower]["macs"] == tower.macs
    text = cli("profile", name, "--adapter", tmp_path / "adapter", "--targets", "mlp").out
    assert "PlainLora(" in text


def test_other_sizes(cli: Any, tiny_config: Path, hf_folder: Path) -> None:
    """`--image-size` is refused, ignored, or changes the model without changing its position table."""
    for name in (tiny_config, hf_folder):
        document = json.loads(cli("profile", name, "--image-size", 64, *JSON).out)
        assert document["profile"]["vision"]["input_shape"] == [1, 3, 64, 64]
        table = next(
            s for s in document["profile"]["vision"]["sites"] if s["site"].endswith("position_embedding")
        )
        assert table["parameters"] == (64 // 8 * (64 // 8) + 1) * 32
    half = json.loads(cli("profile", hf_folder, "--precision", "bf16", *JSON).out)
    full = json.loads(cli("profile", hf_folder, *JSON).out)
    assert 2 * half["training"][0]["weight_bytes"] == full["training"][0]["weight_bytes"]


def test_measuring(cli: Any, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--measure` needs weights, or prints no time."""
    monkeypatch.setattr(measuring, "_REPEATS", 1)
    monkeypatch.setattr(measuring, "_MATRIX", 32)
    outcome = cli("profile", tiny_config, "--measure", "--device", "cpu", "--targets", "mlp")
    assert (outcome.code, outcome.err) == (0, "")
    assert "measured on cpu" in outcome.out
    assert "matmul of 32x32" in outcome.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--text-tokens", "78"], "this model takes 1 to 77"),
        (["--image-size", "4"], "input of 1x3x4x4"),
        (["--adapter", "missing"], "missing"),
        (["--measure", "--device", "gpu"], "--device: got 'gpu'"),
    ],
)
def test_faults(words: list[str], told: str, cli: Any, tiny_config: Path) -> None:
    """A slip ends in a traceback instead of one line."""
    outcome = cli("profile", tiny_config, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


LLAVA = Path(__file__).parents[2] / "examples" / "llava_next_8b.json"
TWO_BLOCKS = ("--set", "text_config.num_hidden_layers=2", "--set", "vision_config.num_hidden_layers=2")


def test_llava(cli: Any) -> None:
    """LLaVA-NeXT cannot be profiled from the command line, or the tokens that were given are not used."""
    outcome = cli("profile", LLAVA, *TWO_BLOCKS, "--image-size", "480x640", "--text-tokens", 7, "--depth", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert "an image of 480x640: 5 crops, 2,347 tokens of the language model, 1 of them" in outcome.out
    assert "(vision_tower): CLIPVisionModel(" in outcome.out
    counts = ("--crops", 3, "--language-tokens", 20, "--logits", 4)
    document = json.loads(cli("profile", LLAVA, *TWO_BLOCKS, *counts, "--format", "json").out)
    assert document["tokens"] == {"crops": 3, "language": 20, "logits": 4}
    head = next(layer for layer in document["layers"] if layer["path"] == "lm_head")
    assert head["macs"] == 4 * 4096 * 128320


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--crops", "3"], "--crops given without --language-tokens, --logits: give all"),
        (["--targets", "mlp"], "--targets: of CLIP alone, and "),
        (["--image-size", "0x3"], "--image-size: got '0x3', allowed is pixels of a side, or HEIGHTxWIDTH"),
        (
            ["--crops", "3", "--language-tokens", "4", "--logits", "1", "--text-tokens", "3"],
            "--text-tokens and --crops both say how much runs: give one of them",
        ),
    ],
)
def test_llava_and_wrong_flags(cli: Any, words: list[str], message: str) -> None:
    """A flag that does not apply is ignored."""
    outcome = cli("profile", LLAVA, *TWO_BLOCKS, *words)
    assert outcome.code == 2
    assert message in outcome.err


def test_flags_of_llava_are_none_of_clip(cli: Any, tiny_config: Path) -> None:
    """A flag that does not apply is ignored."""
    outcome = cli("profile", tiny_config, "--crops", 3)
    assert outcome.code == 2
    assert "--crops: of LLaVA-NeXT alone" in outcome.err
