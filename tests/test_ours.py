"""What is ours to replace, and what is somebody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.models.export import write_model
from clipgraft.ours import made_by_us, mark_folder, refuse_foreign
from clipgraft.search.searcher import write_page

OURS = {
    "metrics.json": '{"base": {"image_to_text_R@1": 0.5}}',
    "page.html": '<!doctype html><meta charset="utf-8">\n<meta name="generator" content="clipgraft 1">',
    "empty": "",
}
FOREIGN = {
    "thesis.html": "<html><p>made with clipgraft</p>",
    "config.json": '{"model_type": "bert"}',
    "notes.txt": "clipgraft",
    "mine.pt": "precious",
    "odd.safetensors": "\x00" * 20,
    "huge.safetensors": "\xff" * 20,
}


@pytest.fixture
def openclip_clip(tiny_config: Path) -> Clip:
    """A loaded open_clip model of random weights."""
    return cg.load(tiny_config, "none")


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
def test_files_are_known_by_their_record(name: str, tmp_path: Path) -> None:
    """A rerun must replace its own output, and nobody else's."""
    path = tmp_path / name
    path.write_bytes((OURS.get(name) or FOREIGN.get(name, "")).encode("latin-1"))
    assert made_by_us(path) == (name in OURS)
    if name in FOREIGN:
        with pytest.raises(cg.errors.ConfigError, match=r"not made by clipgraft .* say `overwrite=True`"):
            refuse_foreign(path, error=cg.errors.ConfigError)
    refuse_foreign(path, overwrite=True)


def test_weights_of_others_are_theirs(tmp_path: Path) -> None:
    """Days of somebody's training are one mistyped path away."""
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pt")
    assert not made_by_us(tmp_path / "a.safetensors")
    assert not made_by_us(tmp_path / "a.pt")


def test_folders_are_known_by_their_record(tmp_path: Path) -> None:
    """A user's folder with a file of our name in it is still the user's."""
    refuse_foreign(tmp_path)
    (tmp_path / "clipgraft_model.json").write_text("{}")
    with pytest.raises(cg.errors.ModelError, match="this folder was not made by clipgraft"):
        refuse_foreign(tmp_path, error=cg.errors.ModelError)
    mark_folder(tmp_path)
    refuse_foreign(tmp_path)
    assert json.loads((tmp_path / "clipgraft_model.json").read_text())["version"] == cg.__version__


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "folder"])
def test_models_are_replaced_where_they_are_ours(name: str, openclip_clip: Clip, tmp_path: Path) -> None:
    """`merge` to the same place again must work; over a stranger's weights only with --overwrite."""
    out = tmp_path / name
    write_model(openclip_clip, out, "open_clip")
    write_model(openclip_clip, out, "open_clip")
    if name == "folder":
        (out / "clipgraft_model.json").unlink()
    else:
        out.write_text("precious")
    with pytest.raises(cg.errors.ModelError, match="say `overwrite=True`"):
        write_model(openclip_clip, out, "open_clip")
    write_model(openclip_clip, out, "open_clip", overwrite=True)
    assert made_by_us(out)


def test_pages_replace_pages_alone(tmp_path: Path) -> None:
    """`search --html thesis.html` would be the end of a thesis."""
    page = write_page(tmp_path / "a.html", "cat", [])
    write_page(page, "dog", [])
    page.write_text("<p>thesis")
    with pytest.raises(cg.errors.DataError, match=r"`html` .*a\.html: this file was not made by clipgraft"):
        write_page(page, "cat", [])
    assert page.read_text() == "<p>thesis"
    write_page(page, "cat", [], overwrite=True)
    assert "cat" in page.read_text()
