"""`clipgraft merge`: adapters folded into their base, opened by the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from torch import Tensor

import clipgraft as cg
from clipgraft.models.load import load
from explicit_lora import bound, features, inputs, largest, randomise_active
from tiny_pictures import write_pictures

VARIANTS: dict[str, dict[str, Any]] = {
    "vi": {"targets": "all", "use_dora": True},
    "med": {"targets": "attention", "bias": "lora_only", "train_logit_scale": True},
}


@pytest.fixture(params=["open_clip", "transformers"])
def base(request: pytest.FixtureRequest, tiny_config: Path, hf_folder: Path) -> list[str]:
    """Name and tag of the tiny base in each family."""
    return [str(tiny_config), "none"] if request.param == "open_clip" else [f"hf:{hf_folder}"]


@pytest.fixture
def adapters(base: list[str], tmp_path: Path) -> dict[str, Path]:
    """Two saved adapters on the base."""
    clip = load(*base)
    folders = {}
    for seed, (name, options) in enumerate(VARIANTS.items()):
        cg.apply_lora(clip, r=2, name=name, **options)
        randomise_active(clip.model, seed)
        folders[name] = cg.save_adapter(clip, tmp_path / "chạy" / name / "adapter", name=name)
    return folders


@pytest.fixture
def pictures_table(tmp_path: Path) -> Path:
    """A table of twelve pictures with captions."""
    return write_pictures(tmp_path / "pictures")


def wanted(
    base: list[str], adapters: dict[str, Path], weights: dict[str, float]
) -> tuple[cg.Clip, tuple[Tensor, ...]]:
    """The model with its adapters attached, and its features."""
    clip = load(*base)
    for name, folder in adapters.items():
        cg.load_adapter(clip, folder, name)
    cg.combine_adapters(clip, weights, "sum")
    with torch.no_grad():
        return clip, features(clip.model, *inputs(clip.model))


def stock(out: Path, form: str, config: Path | None) -> torch.nn.Module:
    """What the library itself makes of the files, clipgraft left aside."""
    if form == "transformers":
        transformers.AutoTokenizer.from_pretrained(out)
        transformers.AutoImageProcessor.from_pretrained(out)
        return transformers.CLIPModel.from_pretrained(out).eval()
    if out.is_dir():
        return open_clip.create_model_and_transforms(f"local-dir:{out}")[0].eval()
    assert config is not None
    model = open_clip.CLIP(**json.loads(config.read_text()))
    open_clip.load_checkpoint(model, str(out))
    return model.eval()


# A checkpoint holds no configuration: it is opened with that of an open_clip base.
FORMS = [
    (base, form) for base in ("open_clip", "transformers") for form in ("open_clip", "transformers", "auto")
]


@pytest.mark.parametrize(("base", "form"), [*FORMS, ("open_clip", "checkpoint")], indirect=["base"])
def test_a_merged_model_needs_nothing_of_ours(
    form: str, base: list[str], adapters: dict[str, Path], tiny_config: Path, cli: Any, tmp_path: Path
) -> None:
    """A shipped model cannot be opened by its library, or answers differently from its adapter."""
    out = tmp_path / ("m.pt" if form == "checkpoint" else "merged")
    to = "open_clip" if form == "checkpoint" else form
    outcome = cli("merge", adapters["vi"].parent, out, "--to", to)
    assert (outcome.code, outcome.err) == (0, "")
    own = "transformers" if base[0].startswith("hf:") else "open_clip"
    assert f"wrote {own if to == 'auto' else to}: {out} (" in outcome.out
    clip, expected = wanted(base, adapters, {"vi": 1.0})
    model = stock(out, own if to == "auto" else to, tiny_config)
    pixels, ids = inputs(clip.model)
    with torch.no_grad():
        got = features(model, pixels, ids)
    assert largest(got, expected) <= bound(expected)
    assert model.logit_scale.item() == pytest.approx(clip.logit_scale.item())
    assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*")} <= {"0o644"}


def test_several_at_once(base: list[str], adapters: dict[str, Path], cli: Any, tmp_path: Path) -> None:
    """A weighted merge is not the weighted sum, as a model or as one adapter."""
    both = f"{adapters['vi']},{adapters['med']}"
    clip, expected = wanted(base, adapters, {"vi": 0.5, "med": -2.0})
    pixels, ids = inputs(clip.model)
    assert cli("merge", both, tmp_path / "model", "--weights", "0.5,-2", "--to", "transformers").code == 0
    got = cg.load(tmp_path / "model")
    own = cg.load(str(tmp_path / "model")).logit_scale.item()
    assert own == pytest.approx(clip.logit_scale.item(), abs=1e-6)
    with torch.no_grad():
        texts = got.encode_text(ids)
    assert largest((texts,), (expected[1],)) <= bound(expected)
    outcome = cli("merge", both, tmp_path / "sum", "--weights", "0.5,-2", "--to", "adapter")
    assert (outcome.code, outcome.err) == (0, "")
    one = load(*base)
    cg.load_adapter(one, tmp_path / "sum")
    with torch.no_grad():
        assert largest(features(one.model, pixels, ids), expected) <= bound(expected)
    outcome = cli("merge", both, tmp_path / "small", "--to", "adapter", "--rank", 3)
    assert "cut to rank 3: " in outcome.out
    assert {a.shape[0] for a, _ in cg.read_adapter(tmp_path / "small").weights.values()} == {3}


def test_an_average_is_measured(tiny_config: Path, pictures_table: Path, cli: Any, tmp_path: Path) -> None:
    """The average is not that of the adapters, or the table shows other numbers than theirs."""
    clip, pairs = load(str(tiny_config), "none"), cg.read_pairs(pictures_table)
    folders, losses = [], []
    for seed in range(2):
        cg.apply_lora(clip, r=2, targets="attention", name=f"s{seed}")
        randomise_active(clip.model, seed)
        folders.append(str(cg.save_adapter(clip, tmp_path / f"s{seed}", name=f"s{seed}")))
        losses.append(cg.evaluate_retrieval(clip, pairs)["image_to_text_mean_rank"])
    out = tmp_path / "mean"
    words = [",".join(folders), out, "--to", "adapter", "--average", "--rank", 2, "--eval", pictures_table]
    outcome = cli("merge", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "% of the average is lost (Frobenius norm), " in outcome.out
    table = [line for line in outcome.out.splitlines() if line.startswith("image_to_text_mean_rank")]
    other = load(str(tiny_config), "none")
    cg.load_adapter(other, out)
    kept = cg.evaluate_retrieval(other, pairs)["image_to_text_mean_rank"]
    cg.combine_adapters(clip, {"s0": 0.5, "s1": 0.5}, "whole")
    whole = cg.evaluate_retrieval(clip, pairs)["image_to_text_mean_rank"]
    assert table[0].split()[2] == f"{sum(losses) / 2:.1f}"
    assert table[0].split()[4:] == [f"{whole:.1f}", f"{kept:.1f}"]


def test_onnx_runtime_runs_it(tiny_config: Path, cli: Any, tmp_path: Path) -> None:
    """A merged model exported to ONNX answers differently from its adapter, or for one batch size only."""
    import onnxruntime

    clip = load(str(tiny_config), "none")
    cg.apply_lora(clip, r=2, targets="all")
    randomise_active(clip.model)
    folder = cg.save_adapter(clip, tmp_path / "adapter")
    outcome = cli("merge", folder, tmp_path / "onnx", "--to", "onnx")
    assert (outcome.code, outcome.err) == (0, "")
    assert "text.onnx agrees with PyTorch to" in outcome.out
    for batch in (1, 4):
        pixels, ids = inputs(clip.model, batch=batch)
        with torch.no_grad():
            expected = features(clip.model, pixels, ids)
        for name, x, y in (("vision", pixels, expected[0]), ("text", ids, expected[1])):
            session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx")
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert largest((torch.from_numpy(got),), (y,)) <= bound((y,))


def test_what_is_refused(adapters: dict[str, Path], base: list[str], cli: Any, tmp_path: Path) -> None:
    """A wrong command ends in a traceback, merges something else, or overwrites what was there."""
    vi = adapters["vi"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    for words, message in (
        ([], "ADAPTERS is missing: adapter to merge"),
        ([vi], "OUT is missing: where to write"),
        ([tmp_path / "nothing", tmp_path / "out"], "no adapter at"),
        ([f"{vi},{vi}", tmp_path / "out", "--weights", "1"], "--weights: 1 numbers for 2 adapters"),
        ([vi, tmp_path / "out", "--weights", "much"], "--weights: got 'much'"),
        ([vi, tmp_path / "m.onnx"], "ONNX is two files, one a tower: name a folder, with --to onnx"),
        ([vi, tmp_path / "out", "--rank", "2"], "--rank belongs to --to adapter"),
        ([vi, tmp_path / "out", "--average"], "--average given with one adapter"),
        ([f"{vi},{vi}", tmp_path / "out", "--average", "--weights", "1,1"], "--weights does not: give one"),
        ([vi, tmp_path / "out", "--eval-task", "classification"], "--eval-task given without --eval"),
        ([vi, tmp_path / "out", "--eval", vi], "--eval compares adapters with what is made of them"),
        ([vi, tmp_path / "out", "--pretrained", "x"], "belongs to a --model"),
        ([vi, tmp_path / "out", "--to", "tflite"], "--to: got 'tflite', allowed is one of"),
        (
            [vi, tmp_path / "out", "--to", "onnx-int8"],
            "nothing to measure it on: add --gate, a table of images",
        ),
        ([vi, tmp_path / "out", "--gate", vi], "--gate belongs to --to onnx-int8"),
        ([vi, tmp_path / "out", "--max-recall-loss", "1"], "--max-recall-loss belongs to --to onnx-int8"),
        (
            [vi, tmp_path / "out", "--to", "comfyui"],
            "--to comfyui writes one file: name it with .safetensors",
        ),
        ([vi, tmp_path / "taken"], "thesis.txt, which is no part of a"),
        ([vi, tmp_path / "taken", "--to", "adapter"], "exists already and is left as it is"),
        ([vi, tmp_path / "out", "--model", "emoji"], "made for a base with fingerprint"),
    ):
        outcome = cli("merge", *words)
        assert outcome.code == 2, words
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == (1 if words else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chạy", "taken"]


def test_what_has_no_flag_is_named_by_its_place(cli: Any) -> None:
    """`--out`, from habit, is answered with "did you mean --out?"."""
    outcome = cli("merge", "--adapter", "a,b", "--out", "c", "--average")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "clipgraft: --adapter: there is no such flag (did you mean ADAPTERS, which takes no flag?)",
        "clipgraft: --out: there is no such flag (did you mean OUT, which takes no flag?)",
    ]
