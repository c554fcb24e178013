"""Results print as a line of the numbers that matter, and are plain values for whoever wants to keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.data.summary import LabelReport, PairReport
from clipgraft.models.sites import Site
from clipgraft.results import Result
from clipgraft.search.manifest import VectorSet

METRICS = {"epoch": 2.0, **{f"image_to_text_R@{k}": 0.123456 for k in (1, 5, 10)}, "text_to_image_R@1": 0.5}
RUN = cg.train.FitResult(
    Path("run"), Path("run/a"), 400_000, 28_672, 12.3456, [{"epoch": 1.0}, METRICS], {"x": 0.1}, 2
)
ENCODED = cg.search.EncodeResult(Path("out"), 1_200, 7, 3, 2, 1_207, (VectorSet("", None, None),), 4.5)
READ = {"source": Path("t.csv"), "kind": "csv", "unit": "line", "rows": 5_000, "bad_rows": 3}
CLASSES = tuple(map(str, range(900)))
LABELS = LabelReport(**READ, images=4_500, classes=CLASSES, counts=(5,) * 900)
DATA = PairReport(**READ, images=4_000, captions=4_997, fewest_captions=1, most_captions=2)
SITES = [Site("text", block, role) for block in range(12) for role in ("q", "v")]
SUM = cg.lora.Combination(
    "a+b", {"a": 1.0, "b": -0.5}, dict.fromkeys(SITES, 8), 0.01, dict.fromkeys(SITES, 0.01)
)


@pytest.fixture(scope="module")
def clip() -> cg.Clip:
    """The embedded base."""
    return cg.load("emoji")


@pytest.fixture(scope="module")
def measured(clip: cg.Clip) -> dict[str, Any]:
    """What the functions that count return."""
    return {
        "costs": cg.profile.target_costs(clip, ["text-attention"])[0],
        "training": cg.profile.training_costs(clip, ["text-attention"])[0],
        "profile": cg.profile.costs(clip),
        "inspection": cg.profile.inspect(clip),
        "compacted": cg.compact.compact_model(clip, text_layers=1),
    }


def short(result: Result, *needed: str) -> None:
    """It prints on few lines with what is needed, and is JSON."""
    told = repr(result)
    assert str(result) == told
    assert len(told.splitlines()) <= 15
    assert len(told) < 900
    for text in needed:
        assert text in told
    json.dumps(result.to_dict())


def test_results_of_work_are_read_at_a_glance() -> None:
    """Printing a result filled the screen with the history of a run, 900 classes or every site."""
    short(RUN, "saved run/a", "trainable 28,672", "image_to_text_R@1 0.1235", "and 1 more")
    short(ENCODED, "encoded 1,200", "errors 2", "seconds 4.5")
    short(LABELS, "rows 5,000", "images 4,500", "[0, 1, 2, 3, and 896 more]")
    short(DATA, "5,000", "4,000")
    short(SUM, "name a+b", "b -0.5", "error 0.01", "text.0.q 8", "and 20 more")
    assert "history" not in repr(RUN)
    assert RUN.to_dict()["history"] == [{"epoch": 1.0}, METRICS]
    assert SUM.to_dict()["ranks"]["text.11.v"] == 8
    assert LABELS.to_dict()["images"] == 4_500


def test_costs_and_models_are_read_at_a_glance(measured: dict[str, Any], clip: cg.Clip) -> None:
    """Printing a profile filled the screen with every layer, and a smaller model with all its token ids."""
    short(measured["costs"], f"parameters {measured['costs'].parameters:,}", "targets text-attention")
    short(measured["training"], f"memory_bytes {measured['training'].memory_bytes:,}")
    short(measured["profile"], f"macs {measured['profile'].macs:,}")
    short(measured["inspection"], f"macs {measured['profile'].macs:,}", "library ")
    short(measured["compacted"], f"parameters {measured['compacted'].parameters:,}")
    frame = measured["profile"].to_pandas().set_index("tower")
    assert frame.loc["both", "MACs"] == measured["profile"].macs
    assert frame.loc["text", "weights"] == measured["profile"].text.parameters
    assert measured["inspection"].to_pandas().iloc[:, -1].sum() == sum(
        site.lora_parameters for site in measured["inspection"].sites
    )
    assert "clip" not in measured["compacted"].to_dict()
    assert measured["profile"].to_dict()["macs"] == measured["profile"].macs


def test_an_adapter_file_is_read_at_a_glance(clip: cg.Clip, tmp_path: Path) -> None:
    """Printing an adapter filled the screen with its matrices."""
    cg.apply_lora(clip, r=2, targets="text-attention")
    cg.save_adapter(clip, tmp_path / "a")
    short(cg.read_adapter(tmp_path / "a"), "text.0.q", "base {name emoji", f"fingerprint {clip.fingerprint}")
    cg.remove_lora(clip)


def test_names_of_strangers_stay_on_their_line() -> None:
    """A class called after an escape sequence would clear the terminal of whoever prints the report."""
    labels = LabelReport(**READ, images=1, classes=("a\x1b[2J\nb",), counts=(1,))
    short(labels, "a\\u001b[2J | b")
