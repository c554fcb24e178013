"""`AdapterBuilder` against building each adapter by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import clipgraft as cg
from clipgraft.adapters.attach import detached, read_for
from clipgraft.adapters.builder import AdapterBuilder
from clipgraft.adapters.open import Clip
from served_adapters import KINDS, write_adapter


@pytest.fixture(scope="module")
def clip() -> Clip:
    return cg.load("emoji")


def test_each_gets_its_own_numbers_and_settings(clip: Clip, tmp_path: Path) -> None:
    """The second adapter of a shape answers with the first one's weights, rank or scale."""
    options = {
        **KINDS,
        "other scale": {"targets": "text-attention", "r": 4, "alpha": 9},
        "other rank": {"targets": "text-attention", "r": 3},
        "own ranks": {"targets": "text-attention", "r": 4, "rank_pattern": {"text.0.q": 2}},
        "fewer": {"targets": "text.0.*", "r": 4},
    }
    places = [
        write_adapter(clip, tmp_path / f"{name} {seed}", seed, **kind)
        for seed in range(2)
        for name, kind in options.items()
    ]
    builder = AdapterBuilder(clip)
    for place in places * 2:
        got, _ = builder.read(place)
        wanted = detached(clip, read_for(clip, place))
        assert got.settings == wanted.settings
        assert got.origin == wanted.origin
        assert list(got.layers) == list(wanted.layers)
        for site, layer in wanted.layers.items():
            own = got.layers[site]
            assert (own.scaling, own.r, own.kind, type(own)) == (
                layer.scaling,
                layer.r,
                layer.kind,
                type(layer),
            )
            for name, tensor in layer.state_dict().items():
                assert torch.equal(own.state_dict()[name], tensor)
            assert own.is_plain == layer.is_plain


def test_each_is_checked(clip: Clip, tmp_path: Path) -> None:
    """An adapter of another base is served because one like it was of this base."""
    builder = AdapterBuilder(clip)
    builder.read(write_adapter(clip, tmp_path / "a", 0, **KINDS["text"]))
    place = write_adapter(clip, tmp_path / "b", 1, **KINDS["text"])
    record = json.loads((place / "clipgraft.json").read_text(encoding="utf-8"))
    record["base"]["fingerprint"] = "0" * 16
    (place / "clipgraft.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(cg.errors.AdapterError, match="with fingerprint 0000000000000000"):
        builder.read(place)
