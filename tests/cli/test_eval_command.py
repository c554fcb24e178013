"""`clipgraft eval`: a base, and an adapter beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.cli.eval import metrics_table
from clipgraft.data import features
from clipgraft.data.args import FeatureArgs
from clipgraft.evaluate.compare import compare_retrieval
from clipgraft.models import device
from clipgraft.models.load import load


@pytest.fixture
def adapter(tiny_config: Path, tmp_path: Path) -> Path:
    """An adapter on the tiny base that changes what the text tower says."""
    clip = load(str(tiny_config), "none")
    cg.apply_lora(clip, r=2, targets="text.*.*")
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return cg.save_adapter(clip, tmp_path / "bộ chuyển")


def test_a_base_alone(cli: Any, base: list[str], table: Path) -> None:
    """What the untouched base can do is the first number to know."""
    outcome = cli("eval", *base, "--val-data", table, "--workers", 0)
    assert (outcome.code, outcome.err) == (0, "")
    assert "image_to_text_R@1" in outcome.out
    assert "adapter" not in outcome.out


def test_validation_data_with_columns_of_their_own(
    cli: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """Validation data of another source would have to be rewritten with the training data's column names."""
    pairs = cg.read_pairs(table)
    other = tmp_path / "other.csv"
    rows = [f"{image.name};{text}" for image, texts in zip(*pairs_of(pairs), strict=True) for text in texts]
    other.write_bytes("\n".join(["pic;words", *rows, "x.png;é"]).encode("cp1252"))
    flags = {"img-key": "pic", "caption-key": "words", "separator": ";", "encoding": "cp1252"}
    own = [word for name, value in flags.items() for word in (f"--val-csv-{name}", value)]
    given = ["--csv-img-key", "image", "--csv-caption-key", "caption", "--val-image-root", table.parent]
    found = cli("eval", *base, "--val-data", other, "--workers", 0, *given, *own)
    assert found.code == 0, found.err
    plain = cli("eval", *base, "--val-data", table, "--workers", 0)
    metrics = re.findall(r"^(\w+_R@\d+ .*)$", found.out, re.M)
    assert metrics
    assert metrics == re.findall(r"^(\w+_R@\d+ .*)$", plain.out, re.M)
    assert cli("eval", *base, "--val-data", other, "--workers", 0, *given).code == 2


def pairs_of(pairs: cg.Pairs) -> tuple[Any, Any]:
    return pairs.images, pairs.captions


def test_an_adapter_beside_its_base(
    cli: Any, base: list[str], table: Path, adapter: Path, tmp_path: Path
) -> None:
    """The table must show the base without, and the adapter with, the update."""
    out = tmp_path / "out" / "metrics.json"
    words = ["--val-data", table, "--workers", 0, "--adapter", adapter, "--out", out]
    assert cli("eval", *base, *words).code == 0
    found = json.loads(out.read_text())
    pairs = cg.read_pairs(table)
    clip = load(base[1], "none")
    assert found["base"] == pytest.approx(cg.evaluate_retrieval(clip, pairs, workers=0))
    cg.load_adapter(clip, adapter)
    assert found["adapter"] == pytest.approx(cg.evaluate_retrieval(clip, pairs, workers=0))
    assert found["base"] != found["adapter"]
    verdict = found["verdict"]["adapter"]
    assert verdict["difference"]["value"] == pytest.approx(
        sum(found["adapter"][name] - found["base"][name] for name in verdict["before"]) / 2
    )


def test_an_adapter_brings_its_base(cli: Any, table: Path, adapter: Path) -> None:
    """`--model ADAPTER` needs to know nothing else."""
    outcome = cli("eval", "--model", adapter, "--val-data", table, "--workers", 0)
    assert outcome.code == 0
    assert "base  adapter" in outcome.out
    assert re.search(r"^adapter: (better|no better|worse) than the base: .* chance is", outcome.out, re.M)


def test_images_are_encoded_again_only_if_their_tower_is_adapted(
    tiny_config: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vision adapter would be measured with the base's images, or a text adapter cost twice the time."""
    pairs = cg.read_pairs(table)
    for targets, times in (("text-attention", 1), ("vision-attention", 2)):
        clip = load(str(tiny_config), "none")
        cg.apply_lora(clip, r=2, targets=targets)
        for name, parameter in clip.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        seen: list[int] = []
        with monkeypatch.context() as patch:
            real = features.image_batches
            patch.setattr(
                features,
                "image_batches",
                lambda paths, *args, seen=seen, real=real, **options: (
                    seen.append(len(paths)) or real(paths, *args, **options)
                ),
            )
            found = compare_retrieval({"base": clip}, pairs, FeatureArgs(workers=0), batch_size=5)
        assert seen == times * [len(pairs)]
        assert found["adapter"].metrics == pytest.approx(cg.evaluate_retrieval(clip, pairs, workers=0))


def test_an_adapter_for_another_base_is_refused(
    cli: Any, hf_folder: Path, base: list[str], table: Path, adapter: Path, tmp_path: Path
) -> None:
    """Numbers of an adapter on the wrong base would be believed."""
    data = ["--val-data", table, "--workers", 0, "--adapter", adapter]
    other = cli("eval", "--model", hf_folder, *data)
    assert other.code == 2
    assert other.err.count("\n") == 1
    model = load(base[1], "none")
    with torch.no_grad():
        model.model.ln_final.bias.add_(1)
    torch.save(model.model.state_dict(), tmp_path / "other.pt")
    shifted = ["--model", base[1], "--pretrained", tmp_path / "other.pt"]
    refused = cli("eval", *shifted, *data)
    assert refused.code == 2
    assert "fingerprint" in refused.err
    assert "--force" in refused.err
    assert cli("eval", *shifted, *data, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--val-data is missing"),
        (["--val-data", "nowhere"], "--val-data nowhere: there is no such file or folder"),
        (
            ["--val-data", ".", "--adapter", "nowhere"],
            "no adapter at nowhere: there is no such file or folder",
        ),
        (["--val-data", ".", "--lora-r", "4"], "--lora-r: there is no such flag"),
    ],
)
def test_bad_input(words: list[str], told: str, cli: Any, base: list[str]) -> None:
    """Whatever is wrong, the user reads one line and a script sees 2."""
    outcome = cli("eval", *base, *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == (2 if "nowhere" in words[3:] else 1), "each fault is one line"


def test_the_table_is_in_percent_and_aligned() -> None:
    """People read recalls in percent and ranks as they are."""
    names = [
        f"{way}_{name}"
        for way in ("image_to_text", "text_to_image")
        for name in ("R@1", "R@5", "R@10", "mean_rank", "median_rank")
    ]
    table = metrics_table({"base": dict.fromkeys(names, 0.5), "adapter": dict.fromkeys(names, 1.0)})
    shown = table.text().splitlines()
    assert len({len(line) for line in shown}) == 1
    assert shown[1].split() == ["image_to_text_R@1", "50.0", "100.0"]
    assert shown[4].split() == ["image_to_text_mean_rank", "0.5", "1.0"]


def test_a_run_and_its_evaluation_share_the_image_features(
    cli: Any, train: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """Every command on the same images would pay for the image tower again."""
    cache = ["--feature-cache", tmp_path / "kho ảnh"]
    trained = train("--use-lora", "--name", "run", *cache)
    assert "training images: 12 images, 0 from the cache, 12 encoded" in trained.out
    assert list((tmp_path / "kho ảnh").glob("*/*.npy"))
    adapter = tmp_path / "logs" / "run" / "adapter"
    words = ["--val-data", table, "--workers", 0, "--adapter", adapter]
    said = "image features: 12 images, 12 from the cache, 0 encoded\n"
    first = cli("eval", *base, *words, *cache).out
    assert said in first
    assert cli("eval", *base, *words, "--feature-cache", "none").out == first.replace(said, "")


def test_the_cache_lies_where_the_environment_says(
    cli: Any, base: list[str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines with a small home folder move the cache by $CLIPGRAFT_CACHE; `none` must write nowhere."""
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(tmp_path / "there"))
    words = ["--val-data", table, "--workers", 0]
    assert cli("eval", *base, *words, "--feature-cache", "none").code == 0
    assert not (tmp_path / "there" / "features").exists()
    assert cli("eval", *base, *words, "--cache-gb", "1e-6").code == 0
    assert not (tmp_path / "there" / "features").exists(), "more than a kilobyte"
    assert cli("eval", *base, *words).code == 0
    assert list((tmp_path / "there" / "features").glob("*/*.npy"))


def test_exact_preprocessing_is_asked_for(
    cli: Any, train: Any, base: list[str], table: Path, tmp_path: Path
) -> None:
    """Who compares with another tool's features to the last digit needs the base's own transform."""
    cache = ["--feature-cache", tmp_path / "features"]
    words = [*base, "--val-data", table, "--workers", 0, *cache]
    known = "12 from the cache, 0 encoded"
    assert known not in cli("eval", *words).out
    assert known not in cli("eval", *words, "--exact-preprocess").out
    assert known in cli("eval", *words, "--exact-preprocess").out
    assert known in train("--use-lora", "--exact-preprocess", *cache).out


@pytest.mark.parametrize(("fp32", "chosen"), [(4.2, "bf16"), (1.0, "fp32")])
def test_precision_is_measured_unless_it_is_chosen(
    fp32: float,
    chosen: str,
    cli: Any,
    base: list[str],
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluation would be several times slower than it could be, and nobody would know."""
    monkeypatch.setattr(device, "bf16_speed", lambda device: fp32)
    words = ["--val-data", table, "--workers", 0]
    assert f"computing in {chosen}" in cli("eval", *base, *words, "--precision", "auto").out
    assert f"computing in {chosen}" in cli("eval", *base[:-2], *words).out
    assert "computing in" not in cli("eval", *base, *words).out


def test_a_run_beside_its_base(cli: Any, train: Any, base: list[str], table: Path, tmp_path: Path) -> None:
    """What full fine-tuning bought is not seen, or is headed `base`."""
    assert train("--name", "full", "--lr", "1e-2").code == 0
    out, run = tmp_path / "metrics.json", tmp_path / "logs" / "full"
    words = ["--val-data", table, "--workers", 0, "--precision", "fp32", "--out", out]
    outcome = cli("eval", "--model", run, *words)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(out.read_text())
    assert list(found) == ["base", "fine-tuned", "verdict"]
    assert any(line.split() == ["base", "fine-tuned"] for line in outcome.out.splitlines())
    pairs = cg.read_pairs(table)
    assert found["base"] == pytest.approx(cg.evaluate_retrieval(load(base[1], "none"), pairs, workers=0))
    assert found["fine-tuned"] == pytest.approx(cg.evaluate_retrieval(cg.load(run), pairs, workers=0))
    assert found["base"] != found["fine-tuned"]
    params = json.loads((run / "params.json").read_text())
    params["source"]["name"] = str(tmp_path / "gone.json")
    (run / "params.json").write_text(json.dumps(params))
    alone = cli("eval", "--model", run, *words)
    assert alone.code == 2, "the architecture of a checkpoint is its base's"


def test_a_distilled_run_beside_its_base(cli: Any, hf_folder: Path, table: Path, tmp_path: Path) -> None:
    """The student of a distillation can be measured in the folder alone that `compact` writes at its end."""
    small = ["--text-layers", 1, "--distill-data", table, "--batch-size", 8, "--epochs", 1, "--workers", 0]
    assert cli("compact", f"hf:{hf_folder}", tmp_path / "small", *small).code == 0
    words = ["--val-data", table, "--workers", 0]
    outcome = cli("eval", "--model", tmp_path / "small-distill", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert any(line.split() == ["base", "distilled"] for line in outcome.out.splitlines())
