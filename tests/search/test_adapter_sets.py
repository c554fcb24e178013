"""Which adapters share vectors, and which get a folder of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import clipgraft as cg
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.search.encode import encode_folder
from clipgraft.search.folder import adapter_digest
from clipgraft.search.manifest import read_manifest
from encoded_folders import GOOD, MakeAdapter, read_encoded, tree_bytes, vectors_one_by_one

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}


def test_one_adapter_on_the_image_tower(
    clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Vectors would be the base's although an adapter was asked for."""
    encode_folder(clip, pictures, tmp_path / "base", **SMALL)
    cg.load_adapter(clip, make_adapter("eye", "vision.*.*"), name="eye")
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    found, base = read_encoded(tmp_path / "out"), read_encoded(tmp_path / "base")
    keys = list(found)
    vectors = np.stack([found[key] for key in keys])
    assert vectors == pytest.approx(vectors_one_by_one(clip, pictures, keys), abs=1e-2)
    assert np.abs(vectors - np.stack([base[key] for key in keys])).max() > 0.1
    assert set(pq.read_table(tmp_path / "out/metadata/metadata_0.parquet").column("adapter").to_pylist()) == {
        "eye"
    }


def test_an_adapter_on_the_text_tower_shares_the_base(
    clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Every language adapter would need an image index of its own, and a rerun with another be refused."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    before = tree_bytes(tmp_path / "out")
    cg.load_adapter(clip, make_adapter("vi", "text.*.*"))
    assert encode_folder(clip, pictures, tmp_path / "out", **SMALL).encoded == 0
    assert tree_bytes(tmp_path / "out") == before


def test_several_adapters_in_one_pass(
    clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter would decode every image again, or the vectors of one stand under another's name."""

    from clipgraft.search import engines

    decoded: list[object] = []
    real = engines._content
    monkeypatch.setattr(engines, "_content", lambda part: decoded.append(part) or real(part))  # type: ignore[func-returns-value]
    paths = {
        name: make_adapter(name, targets)
        for name, targets in (
            ("vi", "text.*.*"),
            ("eye", "vision.*.q,v"),
            ("med", "text.*.q"),
            ("both", "text.*.q,vision.*.fc1"),
        )
    }
    for name, path in paths.items():
        cg.load_adapter(clip, path, name=name, activate=False)
    cg.set_adapter(clip, "med")
    result = encode_folder(
        clip,
        pictures,
        tmp_path / "out",
        adapters=list(paths),
        adapter_paths={name: str(path) for name, path in paths.items()},
        **SMALL,
    )
    assert len(decoded) == GOOD + 2
    assert [part.folder for part in result.sets] == ["base", "eye", "both"]
    state = lora_state(clip)
    assert state is not None
    assert (state.active, state.enabled) == ("med", True)
    for folder, active in (("base", None), ("eye", "eye"), ("both", "both")):
        cg.set_adapter(clip, active)
        found = read_encoded(tmp_path / "out" / folder)
        vectors = np.stack(list(found.values()))
        assert vectors == pytest.approx(vectors_one_by_one(clip, pictures, list(found)), abs=1e-2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert [(note.name, sorted(note.digests)) for note in manifest.adapters] == [
        ("vi", ["text"]),
        ("eye", ["vision"]),
        ("med", ["text"]),
        ("both", ["text", "vision"]),
    ]


def test_a_digest_tells_adapters_apart(clip: Clip, make_adapter: MakeAdapter) -> None:
    """Vectors of yesterday's adapter would be taken for today's, or a copy of it for another one."""
    for name, path in (("one", "eye"), ("copy", "eye"), ("more", "eyes")):
        cg.load_adapter(clip, make_adapter(path, "vision.*.*"), name=name)
    state = lora_state(clip)
    assert state is not None
    one, copy, more = (adapter_digest(state.named(name), "vision") for name in ("one", "copy", "more"))
    assert one == copy != more
    assert adapter_digest(state.named("one"), "text") is None
    for layer in state.named("copy").layers.values():
        layer.scaling *= 2
    assert adapter_digest(state.named("copy"), "vision") != one


def test_a_merged_adapter_is_refused(
    clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Vectors of base and adapter would be passed off as the base's."""
    cg.load_adapter(clip, make_adapter("eye", "vision.*.*"))
    cg.merge_lora(clip)
    with pytest.raises(cg.errors.AdapterError, match="unmerge_lora"):
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
