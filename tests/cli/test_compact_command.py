"""`clipgraft compact`: smaller models that stock transformers opens, distilled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import clipgraft as cg
from clipgraft.models.load import load
from clipgraft.train.loop import Interrupted

QUICK = ("--workers", 0, "--precision", "fp32")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A corpus of one text a line."""
    path = tmp_path / "văn bản.txt"
    path.write_text("the\n\n  hat and the tea  \nthe\n", encoding="utf-8")
    return path


def test_writes_what_transformers_opens(hf_folder: Path, texts: Path, cli: Any, tmp_path: Path) -> None:
    """The smaller model cannot be used outside of clipgraft, or is not the one that was described."""
    out = tmp_path / "nhỏ"
    outcome = cli(
        "compact",
        f"hf:{hf_folder}",
        out,
        "--text-layers",
        1,
        "--vision-blocks",
        "0,1",
        "--vocab-from",
        texts,
        *QUICK,
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 texts\ntext blocks kept: 0\nvision blocks kept: 0, 1\ntokens kept: 76 of 100\n" in outcome.out
    assert f"wrote transformers: {out} (" in outcome.out
    model = transformers.CLIPModel.from_pretrained(out)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"parameters: {total:,} of " in outcome.out
    inner = transformers.AutoTokenizer.from_pretrained(out)
    assert inner.tokenize("the hat") == ["the</w>", "h", "a", "t</w>"]
    assert cg.load(out).model.config.text_config.num_hidden_layers == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["nhỏ", texts.name])


def test_an_open_clip_base(tiny_config: Path, table: Path, cli: Any, tmp_path: Path) -> None:
    """An open_clip base ends in an error, or its captions change."""
    out = tmp_path / "out"
    outcome = cli("compact", tiny_config, out, "--pretrained", "none", "--vocab-from", table, *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    assert "converting to transformers" in outcome.out
    texts = list(cg.data.read_texts(table))
    with torch.no_grad():
        wanted = load(str(tiny_config), "none").encode_text(texts)
        assert torch.allclose(cg.load(out).encode_text(texts), wanted, atol=1e-5)


def test_distils(hf_folder: Path, table: Path, cli: Any, tmp_path: Path) -> None:
    """What is written is the model before distillation, or nothing says what distillation bought."""
    words = ["compact", f"hf:{hf_folder}", tmp_path / "plain", "--text-layers", 1, *QUICK]
    assert cli(*words).code == 0
    words[2] = tmp_path / "small"
    words += ["--distill-data", table, "--val-data", table, "--batch-size", 8, "--epochs", 1, "--lr", 1e-2]
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "base: image_to_text_R@1" in outcome.out
    assert "smaller model: image_to_text_R@1" in outcome.out
    assert "epoch 1: image_to_text_R@1" in outcome.out
    plain, small = (cg.load(tmp_path / name).model.state_dict() for name in ("plain", "small"))
    assert plain.keys() == small.keys()
    assert not torch.equal(plain["text_projection.weight"], small["text_projection.weight"])
    trained = cg.load(tmp_path / "small-distill" / "checkpoints" / "epoch_1").model.state_dict()
    assert all(torch.equal(weight, small[name]) for name, weight in trained.items())
    again = cli(*words[:2], tmp_path / "other", *words[3:], "--run", tmp_path / "small-distill")
    assert again.code == 2
    assert len(again.err.splitlines()) == 1


def test_says_how_to_go_on(
    hf_folder: Path, table: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted distillation leaves half a model, or cannot be continued."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Interrupted("stopped and saved after step 1 of 2")

    monkeypatch.setattr("clipgraft.train.fit.distill", stopped)
    words = [
        "compact",
        f"hf:{hf_folder}",
        tmp_path / "out",
        "--text-layers",
        1,
        "--distill-data",
        table,
        "--batch-size",
        8,
        *QUICK,
    ]
    outcome = cli(*words)
    assert outcome.code == 130
    assert outcome.err.endswith("--resume latest\n")
    assert "go on with: clipgraft compact hf:" in outcome.err
    assert not (tmp_path / "out").exists()


def test_what_is_refused(hf_folder: Path, texts: Path, cli: Any, tmp_path: Path) -> None:
    """A wrong command ends in a traceback, or overwrites what was there."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    (tmp_path / "empty.txt").write_text("\n \n")
    clip = load(str(hf_folder))
    cg.apply_lora(clip, r=2)
    adapter = cg.save_adapter(clip, tmp_path / "adapter")
    name, out = f"hf:{hf_folder}", tmp_path / "out"
    for words, message in (
        ([name, out], "nothing to cut: give --text-layers"),
        ([name, tmp_path / "taken", "--text-layers", 1], "exists already and is left as it is"),
        ([name, out, "--text-layers", 3], "--text-layers 3: the text tower has 2; keep 1 to 2"),
        ([name, out, "--text-blocks", "0,2"], "there is no block 2; name some of 0 to 1"),
        ([name, out, "--text-blocks", "one"], "--text-blocks: got 'one', allowed is a whole number"),
        ([name, out, "--vocab-size", 9], "72 byte symbols and 2 special tokens"),
        ([name, out, "--vocab-size", 75, "--vocab-from", texts], "the corpus needs 76 tokens"),
        ([name, out, "--vocab-size", 75, "--vocab-lossy"], "--vocab-lossy needs both"),
        ([name, out, "--vocab-from", tmp_path / "none.csv"], "none.csv: not found"),
        ([name, out, "--vocab-from", tmp_path / "empty.txt"], "holds no text"),
        ([name, out, "--text-layers", 1, "--epochs", 2], "--epochs given without --distill-data"),
        ([name, out, "--text-layers", 1, "--distill-data", out], "there is no such file or folder"),
        ([adapter, out, "--text-layers", 1], "carries an adapter: merge it"),
    ):
        outcome = cli("compact", *words, *QUICK)
        assert outcome.code == 2, words
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
