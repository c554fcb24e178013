"""`clipgraft convert`: one adapter in every format, from the command line."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import peft
import pytest
import torch
from pydantic import Field
from torch import nn

import clipgraft as cg
from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.convert import read_any
from clipgraft.cli.parser import parse
from clipgraft.models.load import load
from clipgraft.options import Options, Positional
from explicit_lora import explicit_model, features, inputs, largest, randomise_lora
from guide_lora import apply_guide, deltas, updates_of

CONFIG = {"model": "ViT-B-32", "pretrained": "openai", "r": 4, "alpha": 6, "dropout": 0.1}


@pytest.fixture
def adapter(tiny_config: Path, tmp_path: Path) -> AdapterFile:
    """A text-attention adapter of two ranks on the tiny base."""
    clip = load(str(tiny_config), "none")
    cg.apply_lora(clip, r=4, alpha=6, rank_pattern={"text.0.q": 2})
    randomise_lora(clip.model)
    return cg.read_adapter(cg.save_adapter(clip, tmp_path / "bộ chuyển"))


def same(one: AdapterFile, other: AdapterFile) -> bool:
    """Whether two adapters make the same update, to the last rounding of fp32."""
    ours, theirs = deltas(one), deltas(other)
    near = all((ours[s] - theirs[s]).abs().max() <= 2**-22 * ours[s].abs().max() for s in ours)
    return ours.keys() == theirs.keys() and near


def test_through_every_format(cli: Any, adapter: AdapterFile, tiny_config: Path, tmp_path: Path) -> None:
    """A user moves an adapter to a colleague's code and back, and it is another one."""
    source = adapter.path
    layers = ["--text-layers", 2, "--vision-layers", 2]
    for form, name in (("guide", "g.pt"), ("guide-full", "f.pt"), ("clip-lora", "c.pt"), ("peft", "p")):
        outcome = cli("convert", source, tmp_path / name, "--to", form, *layers)
        assert (outcome.code, outcome.err) == (0, "")
        read = outcome.out.splitlines()[0]
        wrote = next(line for line in outcome.out.splitlines() if line.startswith("wrote"))
        assert f"{source}, 8 sites, rank 2 to 4, scale 1.5" in read
        assert f"base {tiny_config} / none" in read
        assert f"wrote {form}: {tmp_path / name}, " in wrote
        assert " bytes (" in wrote
        source = tmp_path / name
    assert f"{source}, " in wrote
    final = cg.read_adapter(source)
    assert same(final, adapter)
    assert (final.fingerprint, final.base) == (adapter.fingerprint, adapter.base)
    clip = cg.load(source)
    wanted = explicit_model(load(str(tiny_config), "none").model, updates_of(adapter))
    sample = inputs(clip.model)
    assert largest(features(clip.model, *sample), features(wanted, *sample)) < 1e-5


def test_what_the_guide_trained(cli: Any, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A checkpoint of the guide cannot be used anywhere else, or computes something else there."""
    trained = copy.deepcopy(tiny_openclip)
    apply_guide(trained, 4, 6, ["in_proj", "out_proj"])
    lora = {name: p for name, p in trained.named_parameters() if "lora_" in name}
    torch.manual_seed(0)
    for parameter in lora.values():
        torch.nn.init.normal_(parameter)
    torch.save({"epoch": 1, "lora_state_dict": lora, "lora_config": CONFIG}, tmp_path / "epoch_1.pt")
    outcome = cli("convert", "--to", "peft", tmp_path / "epoch_1.pt", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "read guide: " in outcome.out
    assert "base ViT-B-32 / openai" in outcome.out
    cg.load_adapter(tiny_openclip, tmp_path / "out")
    sample = inputs(tiny_openclip)
    # fp64: with updates this large, fp32 rounds each way of computing the features by up to 1e-4.
    with torch.no_grad():
        found, wanted = (features(model.double(), *sample) for model in (tiny_openclip, trained.eval()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_on_open_clip(cli: Any, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The choice between what PEFT did and what was meant is made silently, or its flag does nothing."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)
    peft.get_peft_model(tiny_openclip, config).save_pretrained(tmp_path / "peft")
    words = ["convert", tmp_path / "peft", tmp_path / "out", "--to", "peft", "--model", "ViT-B-32"]
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert "--peft-out-proj as-run" in outcome.err
    assert not (tmp_path / "out").exists()
    outcome = cli(*words, "--pretrained", "openai", "--peft-out-proj", "as-run")
    assert (outcome.code, outcome.err) == (0, "")
    found = cg.read_adapter(tmp_path / "out")
    assert found.base == {"name": "ViT-B-32", "pretrained": "openai", "family": "open_clip"}
    assert {round(scale, 9) for site, (*_, scale) in updates_of(found).items() if site.endswith("out")} == {3}


def test_full_with_another_base(cli: Any, adapter: AdapterFile, tiny_config: Path, tmp_path: Path) -> None:
    """An adapter is written among the weights of a base that it was not trained on."""
    other = load(str(tiny_config), "none", seed=1).model
    torch.save(other.state_dict(), tmp_path / "other.pt")
    flags = ["--to", "guide-full", "--model", tiny_config, "--pretrained", tmp_path / "other.pt"]
    outcome = cli("convert", adapter.path, tmp_path / "out.pt", *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"fingerprint {adapter.fingerprint}" in outcome.err
    assert not (tmp_path / "out.pt").exists()


def test_a_trained_temperature_is_told(cli: Any, tiny_hf: nn.Module, tmp_path: Path) -> None:
    """The guide's reader has no place for the temperature, and nobody is told."""
    cg.apply_lora(tiny_hf, train_logit_scale=True)
    folder = cg.save_adapter(tiny_hf, tmp_path / "a")
    outcome = cli("convert", folder, tmp_path / "g.pt", "--to", "guide", "--model", "ViT-B-32")
    assert outcome.code == 0
    assert "temperature" in outcome.out
    assert read_any(tmp_path / "g.pt").logit_scale == cg.read_adapter(folder).logit_scale


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing", "out", "--to", "peft"], "no adapter at nothing: there is no such file"),
        (
            ["a", "out", "--to", "hf"],
            "--to: got 'hf', allowed is one of 'peft', 'guide', 'guide-full' or 'clip-lora'",
        ),
        (["a", "out", "more", "--to", "peft"], "'more' belongs to no flag"),
        (["a", "out", "--to", "peft", "--pretrained", "x"], "--pretrained x belongs to a --model"),
        (["a", "out", "--to", "peft", "--peft-out-proj", "no"], "--peft-out-proj: got 'no'"),
        (["a", "out", "--to", "clip-lora", "--text-layers", "0"], "--text-layers: got '0'"),
        (["a", "taken", "--to", "peft"], "taken exists already and is left as it is"),
        (
            ["taken", "out", "--to", "peft"],
            "taken: cannot be read: it is truncated, damaged or no torch checkpoint",
        ),
    ],
)
def test_bad_usage_is_one_line(
    words: list[str], told: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake on the command line ends in a page of traceback."""
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a thesis")
    outcome = cli("convert", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"clipgraft: {told}")
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert Path("taken").read_text() == "a thesis"


def test_every_missing_word_is_named(cli: Any) -> None:
    """`clipgraft convert` alone should say all that it needs, each in its line."""
    lines = cli("convert").err.splitlines()
    starts = (
        "clipgraft: SRC is missing: ",
        "clipgraft: OUT is missing: ",
        "clipgraft: --to is missing: one of 'peft'",
    )
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3


def test_help_shows_the_places(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The two paths are nowhere in the help, or are shown as flags; or it loads torch to say so."""
    with pytest.raises(SystemExit):
        cli("convert", "--help")
    text = capsys.readouterr().out
    assert "usage: clipgraft convert [--flags] SRC OUT\n" in text
    assert "\n  SRC  " in text
    assert "\n  OUT  " in text
    assert "--src" not in text
    assert "Undefined" not in text
    code = "import sys\nfrom clipgraft.cli import main\ntry: main(['convert', '--help'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class Places(Options):
    """A spec with places."""

    first: Annotated[Path, Positional()]
    second: Annotated[Path, Positional()] = Path("default")
    number: int = Field(3, description="a number")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a"], ("a", "default", 3)),
        (["a", "b"], ("a", "b", 3)),
        (["--number", "-5", "a", "b"], ("a", "b", -5)),
        (["a", "--number", "5", "b"], ("a", "b", 5)),
        (["a", "b", "--number=5"], ("a", "b", 5)),
        (["--config", "x.yaml"], ("from yaml", "default", 3)),
        (["a", "--config", "x.yaml"], ("a", "default", 3)),
    ],
)
def test_places_go_anywhere_between_flags(
    words: list[str], wanted: tuple[str, str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`convert --to peft SRC OUT` works and `convert SRC --to peft OUT` does not."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("first: from yaml\n")
    (spec,) = parse("x", "", [Places], words)
    assert (str(spec.first), str(spec.second), spec.number) == wanted


def test_faults_of_places_stand_with_the_others() -> None:
    """A missing path hides what else is wrong."""
    with pytest.raises(cg.errors.ConfigError) as caught:
        parse("x", "", [Places], ["--number", "many", "--nmber", "3"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--nmber", "--number"]
    with pytest.raises(cg.errors.ConfigError) as caught:
        parse("x", "", [Places], ["--number", "many"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["FIRST is missing", "--number"]
