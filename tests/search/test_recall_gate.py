"""int8 is used only where it was measured to lose little on the user's own pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipgraft.data.datasets import Pairs
from clipgraft.engine.quantized import int8_works
from clipgraft.errors import ConfigError
from clipgraft.evaluate.recall_loss import recall_lost
from clipgraft.models.clip import Clip
from clipgraft.search import recall_gate
from clipgraft.search.encode import encode_folder
from encoded_folders import read_encoded, vectors_one_by_one

SMALL = {"batch_size": 4, "shard_rows": 60, "workers": 0}
needs_vnni = pytest.mark.skipif(not int8_works(), reason="int8 needs a CPU with VNNI")


@pytest.fixture
def table(pictures: Path) -> Path:
    """A table of four of the pictures with a caption each."""
    names = sorted(path.relative_to(pictures) for path in pictures.rglob("0[1-8].jpg"))
    path = pictures.parent / "pairs.csv"
    lines = [f"{pictures / name},a picture of {number}" for number, name in enumerate(names)]
    path.write_text("\n".join(["filepath,title", *lines]) + "\n", encoding="utf-8")
    return path


def test_points_lost_are_counted_by_hand() -> None:
    """The gate would let through what it is there to stop."""
    pairs = Pairs(tuple(Path(f"{i}.jpg") for i in range(4)), (("a",), ("b",), ("c",), ("d",)))
    exact = torch.eye(4)
    lossy = exact[[1, 0, 2, 3]]  # two of four images have changed places: R@1 falls from 100 to 50 %
    loss = recall_lost((exact, exact), (lossy, exact), pairs)
    assert loss.points == pytest.approx(50)
    assert loss.reference[loss.worst] == 1
    assert loss.approximate[loss.worst] == 0.5
    assert loss.worst.endswith("R@1")
    loss.require_at_most(50, "int8")
    with pytest.raises(ConfigError, match=r"int8 loses 50.00 points .* is 50.0 % instead of 100.0 % on 4"):
        loss.require_at_most(49.9, "int8")


@needs_vnni
def test_what_passes_is_encoded_and_recorded(clip: Clip, pictures: Path, table: Path, tmp_path: Path) -> None:
    """A folder in int8 would not say what that costs, or its vectors would be of other images."""
    out = tmp_path / "out"
    encode_folder(clip, pictures, out, int8=True, gate=table, max_recall_loss=100, **SMALL)
    written = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert written["compute"] == "float32 in int8 and bf16"
    (note,) = written["recall"]
    assert (note["table"], note["captions"], note["limit"]) == (str(table), 4, 100)
    assert set(note["reference"]) == set(note["approximate"])
    found = read_encoded(out)
    exact = vectors_one_by_one(clip, pictures, list(found))
    assert (np.stack(list(found.values())).astype(np.float32) * exact).sum(1).min() > 0.999
    (pictures / "new.jpg").write_bytes((pictures / "b/c/05.jpg").read_bytes())
    again = encode_folder(clip, pictures, out, **SMALL)  # goes on in int8, without another measurement
    assert again.encoded == 1
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["recall"] == written["recall"]


@needs_vnni
def test_what_loses_more_is_refused(
    clip: Clip, pictures: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that int8 ruins would be written, and found out about in production."""
    encode = recall_gate._images
    monkeypatch.setattr(
        recall_gate,
        "_images",
        lambda encoder, *rest: encode(encoder, *rest) ** (0 if encoder.int8 else 1),
    )
    with pytest.raises(ConfigError, match=r"int8 loses \d+\.\d\d points of recall, more than"):
        encode_folder(clip, pictures, tmp_path / "out", int8=True, gate=table, **SMALL)
    assert not list(tmp_path.glob("out/**/*.npy"))


@needs_vnni
def test_nothing_to_measure_on(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """int8 would be used on trust."""
    with pytest.raises(ConfigError, match="nothing to measure it on"):
        encode_folder(clip, pictures, tmp_path / "out", int8=True, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": Path("pairs.csv")}, "goes with `int8`"),
        ({"int8": True, "autocast": False}, "leave fp32 out"),
    ],
)
def test_contradictions(
    clip: Clip, pictures: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    """Somebody would believe that int8 was used, or fp32."""
    with pytest.raises(ConfigError, match=message):
        encode_folder(clip, pictures, tmp_path / "out", **{**SMALL, **options})  # type: ignore[arg-type]
