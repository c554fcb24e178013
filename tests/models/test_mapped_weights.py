"""Weights that stay in their file: the same model as copied ones, whatever becomes of the file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ModelError
from clipgraft.models import mapped_weights
from clipgraft.models.mapped_weights import copy_from_files
from clipgraft.process_memory import drop_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="weights are mapped on Linux alone")
_TOKENS = torch.tensor([[49406, 320, 2368, 49407, 0], [49406, 530, 518, 1929, 49407]])


@pytest.fixture(autouse=True)
def _maps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map the weights of tiny models too, and tests that run on any file system."""
    monkeypatch.setattr(mapped_weights, "_SMALLEST", 1)
    monkeypatch.setattr(mapped_weights, "_filesystem", lambda path: "ext4")


@pytest.fixture(params=[".safetensors", ".pt"])
def weights(tiny_openclip: nn.Module, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Save the tiny model in each of the formats that can be mapped."""
    path = tmp_path / f"weights{request.param}"
    _save(tiny_openclip, path)
    return path


def _save(model: nn.Module, path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def _load(config: Path, weights: Path) -> cg.Clip:
    clip = cg.load(config, pretrained=weights)
    assert mapped_weights._lies_in_files(clip.model)
    return clip


def _copied(config: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> cg.Clip:
    with monkeypatch.context() as patch:
        patch.setattr(mapped_weights, "_filesystem", lambda path: "nfs4")
        clip = cg.load(config, pretrained=weights)
    assert not hasattr(clip.model, mapped_weights._FILES)
    return clip


def _features(clip: cg.Clip) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *clip.family.image_size(clip.model), generator=generator)
    with torch.no_grad():
        return [clip.encode_text(_TOKENS), clip.encode_image(pixels)]


def test_mapped_is_copied(tiny_config: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user on a local disk would get another model than one on a network mount."""
    mapped, copied = _load(tiny_config, weights), _copied(tiny_config, weights, monkeypatch)
    for (name, one), other in zip(
        mapped.model.state_dict().items(), copied.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert mapped.fingerprint == copied.fingerprint
    for one, other in zip(_features(mapped), _features(copied), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fate", ["stays", "is replaced", "is deleted"])
def test_training(
    tiny_config: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autocast: bool,
    fate: str,
) -> None:
    """A run would learn something else, or crash, because the base's file is mapped, replaced or deleted."""
    scenes = cg.data.read_pairs(_photos(tmp_path))
    found = []
    for kind in ("copied", "mapped"):
        is_mapped = kind == "mapped"
        clip = _load(tiny_config, weights) if is_mapped else _copied(tiny_config, weights, monkeypatch)
        torch.manual_seed(0)
        cg.apply_lora(clip, r=2, targets="text-attention")
        if is_mapped and fate == "is replaced":
            other = tmp_path / "other"
            other.write_bytes(b"something else")
            other.replace(weights)
        elif is_mapped and fate == "is deleted":
            weights.unlink()
        cg.fit(
            clip,
            scenes,
            train=cg.TrainArgs(batch_size=4, epochs=2, lr=1e-3),
            run=cg.RunArgs(out=tmp_path / kind, progress=False),
            features=cg.FeatureArgs(autocast=autocast, feature_cache=None),
        )
        found.append((_losses(tmp_path / kind), clip.model.state_dict()))
    (losses, state), (other_losses, other_state) = found
    assert losses == other_losses
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


def _losses(run: Path) -> list[float]:
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["loss"] for event in events if event["kind"] == "train"]


def _photos(folder: Path) -> Path:
    table = ["filepath,title"]
    for number in range(8):
        path = folder / f"{number}.png"
        Image.new("RGB", (40, 40), (30 * number, 255 - 30 * number, 100)).save(path)
        table.append(f"{path},colour number {number}")
    (folder / "photos.csv").write_text("\n".join(table), encoding="utf-8")
    return folder / "photos.csv"


@pytest.mark.parametrize("content", ["other", "none"])
def test_changed_in_place(tiny_config: Path, weights: Path, content: str) -> None:
    """A base that is written to in place would crash a run, or silently change its weights."""
    clip = _load(tiny_config, weights)
    encoder = Encoder(clip)
    encoder.encode_text(_TOKENS)
    with weights.open("r+b") as file:
        file.write(b"other") if content == "other" else file.truncate(0)
    os.utime(weights, ns=(1, 1))  # clocks of file systems may be coarse
    with pytest.raises(ModelError, match="was written to while its weights were in use"):
        encoder.encode_text(_TOKENS)


def test_own_copy_outlives_the_file(tiny_config: Path, weights: Path) -> None:
    """A server would stop answering, or crash, when the file of its base is overwritten."""
    clip = _load(tiny_config, weights)
    before = _features(clip)
    copy_from_files(clip.model)
    weights.write_bytes(b"")
    for one, other in zip(before, _features(clip), strict=True):
        assert torch.equal(one, other)


def test_writing_stays_in_the_process(tiny_config: Path, weights: Path) -> None:
    """Fine-tuning would change the file of the base, or lose what was learnt when pages are dropped."""
    content = weights.read_bytes()
    clip = _load(tiny_config, weights)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(1)
    changed = [parameter.detach().clone() for parameter in clip.model.parameters()]
    drop_mapped(clip.model.parameters())
    for one, other in zip(changed, clip.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert weights.read_bytes() == content


def test_dropping_pages_changes_nothing(tiny_config: Path, weights: Path) -> None:
    """Features would be of other weights after a tower's pages were given back."""
    clip = _load(tiny_config, weights)
    before = _features(clip)
    drop_mapped(clip.model.parameters())
    ordinary = torch.randn(1000, 1000)
    kept = ordinary.clone()
    drop_mapped([ordinary])
    assert torch.equal(ordinary, kept)
    for one, other in zip(before, _features(clip), strict=True):
        assert torch.equal(one, other)


def test_weights_that_share_bytes(tiny_config: Path, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A file that names one storage twice would make two weights one, and training one change the other."""
    state = dict(tiny_openclip.state_dict())
    first, second = (f"transformer.resblocks.{block}.mlp.c_fc.weight" for block in (0, 1))
    state[second] = state[first]
    torch.save(state, tmp_path / "shared.pt")
    clip = _load(tiny_config, tmp_path / "shared.pt")
    named = dict(clip.model.named_parameters())
    assert named[first].data_ptr() != named[second].data_ptr()
    assert torch.equal(named[first], named[second])


def test_copies_and_moves(tiny_config: Path, weights: Path) -> None:
    """A deep copy, or a model of another type, would be refused when a file it has nothing of changes."""
    clip = _load(tiny_config, weights)
    twin = copy.deepcopy(clip.model)
    clip.model.to(torch.float64)
    weights.write_bytes(b"")
    mapped_weights.check_unchanged(twin)
    mapped_weights.check_unchanged(clip.model)


def test_hf_folder(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers folder on a local disk would give other features than its copy."""
    folder = tmp_path / "model"
    shutil.copytree(hf_folder, folder)
    mapped = cg.load(f"hf:{folder}")
    assert mapped_weights._lies_in_files(mapped.model)
    monkeypatch.setattr(mapped_weights, "_filesystem", lambda path: "nfs4")
    copied = cg.load(f"hf:{folder}")
    for one, other in zip(
        mapped.model.state_dict().values(), copied.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
