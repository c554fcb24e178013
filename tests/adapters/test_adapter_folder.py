"""Adapters on disk: written, read back from their path alone, and refused where they do not fit."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import features, inputs, largest, randomise_lora

LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf")
WEIGHTS, CONFIG, NATIVE = "adapter_model.safetensors", "adapter_config.json", "clipgraft.json"
OPTIONS = {
    "r": 4,
    "alpha": 6.0,
    "dropout": 0.25,
    "targets": "all",
    "use_rslora": True,
    "rank_pattern": {"text.0.*": 2, "vision.-1.q": 7},
    "alpha_pattern": {"*.*.fc1": 3.0},
}


def adapted(base: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    model = copy.deepcopy(base)
    cg.apply_lora(model, **{**OPTIONS, **options})
    randomise_lora(model, seed)
    return model


def equal_adapters(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = cg.adapters.lora_state_dict(one), cg.adapters.lora_state_dict(other)
    scales = [[layer.scaling for layer in require_lora(m).layers.values()] for m in (one, other)]
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same and scales[0] == scales[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A saved adapter comes back with other weights, scales or settings than it was saved with."""
    base = request.getfixturevalue(layout)
    model = adapted(base)
    folder = cg.save_adapter(model, tmp_path / "new" / "adapter", metrics={"text_to_image_R@1": 0.5})
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, NATIVE}
    other = copy.deepcopy(base)
    adapter = cg.load_adapter(other, folder)
    assert equal_adapters(model, other)
    settings_of = require_lora(other).chosen().settings
    assert (settings_of.r, settings_of.alpha, settings_of.dropout, settings_of.use_rslora) == (
        4,
        6,
        0.25,
        True,
    )
    assert (settings_of.targets, settings_of.train_logit_scale) == ("all", False)
    assert adapter.metrics == {"text_to_image_R@1": 0.5}
    pixels, ids = inputs(base)
    assert largest(features(other, pixels, ids), features(model.eval(), pixels, ids)) == 0
    again = cg.save_adapter(other, tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert equal_adapters(model, other)


def test_a_run_folder_or_a_file_of_it_will_do(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """A user who passes the run, or the weights file inside it, is told that there is no adapter."""
    model = adapted(tiny_hf)
    folder = cg.save_adapter(model, tmp_path / "run" / "adapter")
    for path in (tmp_path / "run", folder / WEIGHTS, folder / CONFIG, str(folder)):
        other = copy.deepcopy(tiny_hf)
        cg.load_adapter(other, path)
        assert equal_adapters(model, other)


def test_loading_replaces_what_the_model_carries(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """The second adapter is stacked on the first, or inherits its temperature."""
    one, two = (
        adapted(tiny_hf, 1, train_logit_scale=True),
        adapted(tiny_hf, 2, targets="text.*.q", rank_pattern={}, alpha_pattern={}),
    )
    one.logit_scale.data.fill_(1.25)
    cg.save_adapter(one, tmp_path / "one")
    cg.save_adapter(two, tmp_path / "two")
    model = copy.deepcopy(tiny_hf)
    cg.load_adapter(model, tmp_path / "one")
    assert (model.logit_scale.item(), model.logit_scale.requires_grad) == (1.25, True)
    cg.load_adapter(model, tmp_path / "two")
    assert equal_adapters(model, two)
    assert (model.logit_scale.item(), model.logit_scale.requires_grad) == (tiny_hf.logit_scale.item(), False)
    cg.load_adapter(model, tmp_path / "one")
    assert equal_adapters(model, one)
    assert model.logit_scale.item() == 1.25
    with cg.lora_disabled(model):
        assert model.logit_scale.item() == tiny_hf.logit_scale.item()
        cg.save_adapter(model, tmp_path / "three")  # the adapter's temperature, not the base's
    assert cg.read_adapter(tmp_path / "three").logit_scale == 1.25


def test_a_failed_load_leaves_the_model_as_it_was(
    tiny_hf: nn.Module, tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """A wrong path in a serving process takes the adapter that was in use away."""
    model = adapted(tiny_hf)
    before = features(model.eval(), *inputs(model))
    foreign = cg.save_adapter(adapted(tiny_openclip), tmp_path / "foreign")
    damaged = cg.save_adapter(model, tmp_path / "damaged")
    config = json.loads((damaged / CONFIG).read_text())
    (damaged / CONFIG).write_text(json.dumps({**config, "lora_dropout": 3}))
    for path in (foreign, damaged, tmp_path / "nothing"):
        with pytest.raises(cg.errors.AdapterError):
            cg.load_adapter(model, path)
        assert largest(features(model, *inputs(model)), before) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_base_is_refused(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """An adapter runs on a base it was not trained on and silently gives worse results."""
    base = request.getfixturevalue(layout)
    folder = cg.save_adapter(adapted(base), tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(p for p in other.parameters() if p.ndim == 4).mul_(1.5)
    ours, theirs = as_clip(base).fingerprint, as_clip(other).fingerprint
    assert ours != theirs
    with pytest.raises(
        cg.errors.AdapterError, match=f"fingerprint {ours}, but this model's is {theirs}.*`force=True`"
    ):
        cg.load_adapter(other, folder)
    cg.load_adapter(other, folder, force=True)
    assert equal_adapters(other, adapted(base))


def test_another_architecture_is_refused_even_by_force(
    tiny_hf: nn.Module, tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """An adapter for another width or depth ends in a traceback."""
    folder = cg.save_adapter(adapted(tiny_openclip), tmp_path / "wide")
    with pytest.raises(cg.errors.AdapterError, match=r"has A \(\d, \d+\), B .* where this model needs"):
        cg.load_adapter(tiny_hf, folder, force=True)
    deep = cg.save_adapter(adapted(tiny_hf), tmp_path / "deep")
    tiny_hf.text_model.encoder.layers = tiny_hf.text_model.encoder.layers[:1]
    with pytest.raises(cg.errors.AdapterError, match=r"no site text\.1\.\w+; load the base it was made for"):
        cg.load_adapter(tiny_hf, deep, force=True)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_base_in_another_precision_is_the_same_base(
    tiny_hf: nn.Module, precision: torch.dtype, tmp_path: Path
) -> None:
    """An adapter trained on a bf16 base is refused by the same base in fp32, or the other way round."""
    other = torch.bfloat16 if precision == torch.float32 else torch.float32
    model = adapted(copy.deepcopy(tiny_hf).to(torch.bfloat16).to(precision))
    folder = cg.save_adapter(model, tmp_path)
    target = copy.deepcopy(tiny_hf).to(torch.bfloat16).to(other)
    cg.load_adapter(target, folder)
    assert equal_adapters(model, target)


def test_load_finds_the_base(
    hf_folder: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cg.load(folder)` needs the user to remember which base the adapter was made for."""
    monkeypatch.chdir(hf_folder.parent)
    relative_hf, relative_config = hf_folder.name, os.path.relpath(tiny_config)
    for number, (name, pretrained) in enumerate(
        [(f"hf:{relative_hf}", None), (relative_hf, None), (relative_config, "none")]
    ):
        monkeypatch.chdir(hf_folder.parent)
        clip = cg.load(name, pretrained)
        cg.apply_lora(clip, r=2, targets="all", train_logit_scale=True)
        randomise_lora(clip.model)
        clip.logit_scale.data.fill_(2.5)
        folder = cg.save_adapter(clip, tmp_path / str(number))
        monkeypatch.chdir(tmp_path)
        again = cg.load(str(folder))
        assert equal_adapters(clip.model, again.model)
        assert again.logit_scale.item() == 2.5
        assert torch.equal(again.encode_text("a cat"), clip.encode_text("a cat"))


def test_load_finds_the_base_of_a_raw_model(hf_folder: Path, tmp_path: Path) -> None:
    """An adapter of a model that came from CLIPModel.from_pretrained does not know its base."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(hf_folder).eval()
    cg.apply_lora(model, targets="all")
    randomise_lora(model)
    assert equal_adapters(model, cg.load(cg.save_adapter(model, tmp_path)).model)


def test_a_base_that_cannot_be_found(hf_folder: Path, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A base that was moved ends in a traceback instead of telling how to load the adapter all the same."""
    moved = tmp_path / "moved"
    shutil.copytree(hf_folder, moved)
    clip = cg.load(str(moved))
    cg.apply_lora(clip)
    folder = cg.save_adapter(clip, tmp_path / "adapter")
    shutil.rmtree(moved)
    with pytest.raises(
        cg.errors.AdapterError, match=f"needs its base .fingerprint {clip.fingerprint}.*load_adapter"
    ):
        cg.load(str(folder))
    unnamed = cg.save_adapter(adapted(tiny_openclip), tmp_path / "unnamed")
    with pytest.raises(cg.errors.AdapterError, match="does not say which base"):
        cg.load(str(unnamed))


class Killed(BaseException):
    """Ends a save as a kill would: nothing that comes after it runs."""


@pytest.mark.parametrize("renames", range(5))
@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_save(
    tiny_hf: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, fresh: bool
) -> None:
    """A save that is killed leaves an adapter that cannot be read, or half of each."""
    old, new = adapted(tiny_hf, 1), adapted(tiny_hf, 2, alpha=9.0, rank_pattern={})
    folder = tmp_path / "adapter"
    if not fresh:
        cg.save_adapter(old, folder, metrics={"is": "old"})
    left, replace = renames, Path.replace

    def dying_replace(source: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying_replace)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        try:
            cg.save_adapter(new, folder, metrics={"is": "new"})
        except Killed:
            assert renames < 4
        else:
            assert renames == 4
    if fresh and renames < 3:
        with pytest.raises(cg.errors.AdapterError, match="no adapter at"):
            cg.read_adapter(folder)
    else:
        model = copy.deepcopy(tiny_hf)
        kind = cg.load_adapter(model, folder).metrics["is"]
        assert equal_adapters(model, {"old": old, "new": new}[kind])
    cg.save_adapter(new, folder, metrics={"is": "new"})
    assert cg.read_adapter(folder).metrics == {"is": "new"}


def test_a_folder_that_cannot_be_written(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """A full disk or a file in the way ends in a traceback."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        cg.errors.WriteError, match=r"cannot write .*file.*: (Not a directory|File exists); choose another"
    ):
        cg.save_adapter(adapted(tiny_hf), tmp_path / "file")
    with pytest.raises(cg.errors.AdapterError, match="carries no LoRA"):
        cg.save_adapter(tiny_hf, tmp_path / "none")


@pytest.fixture(scope="module")
def saved(_hf_master: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `tiny_hf`. Read only."""
    return cg.save_adapter(adapted(_hf_master), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that adapter to be damaged."""
    return shutil.copytree(saved, tmp_path / "adapter")


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / WEIGHTS)


def without(folder: Path, part: str) -> None:
    """Drop some weights and the record that knows of them, as a foreign tool would."""
    (folder / NATIVE).unlink()
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, folder / WEIGHTS)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE = {
    "truncated weights": (lambda f: truncate(f / WEIGHTS, 900), "truncated or damaged"),
    "weights cut in the header": (lambda f: truncate(f / WEIGHTS, 20), "truncated or damaged"),
    "empty weights": (lambda f: truncate(f / WEIGHTS, 0), "truncated or damaged"),
    "weights that are text": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs"),
        "truncated or dam",
    ),
    "weights of another save": (other_weights, "is not the file clipgraft.json was written for"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "an adapter is a folder with adapter_config.json and"),
    "no configuration": (
        lambda f: (f / CONFIG).unlink(),
        "an adapter is a folder with adapter_config.json and",
    ),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "an adapter is a folder with"),
    "no folder": (shutil.rmtree, "there is no such folder"),
    "configuration that is text": (lambda f: (f / CONFIG).write_text("r: 16"), "is not JSON"),
    "configuration of bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "is not JSON"),
    "configuration that is a list": (lambda f: (f / CONFIG).write_text("[]"), "should be an object"),
    "record that is text": (lambda f: (f / NATIVE).write_text("oops"), "is not JSON"),
    "record without its parts": (
        lambda f: (f / NATIVE).write_text(
            json.dumps({k: json.loads((f / NATIVE).read_text())[k] for k in ("format", "weights_sha256")})
        ),
        "base is missing",
    ),
    "record of a later version": (lambda f: edit(f / NATIVE, format=99), "format 99.*update clipgraft"),
    "temperature of text": (
        lambda f: edit(f / NATIVE, logit_scale="hot"),
        "logit_scale is .hot., and should be a number",
    ),
    "temperature of nothing": (lambda f: edit(f / NATIVE, logit_scale=float("nan")), "logit_scale is nan"),
    "A without B": (lambda f: without(f, "q_proj.lora_B"), r"lacks weights of text\.0\.q \(lora_B\.weight\)"),
    "no weights in it": (lambda f: without(f, ""), "lacks the weights of every site"),
    "another rank": (lambda f: edit(f / CONFIG, r=5), "the files are of two adapters"),
    "rank of text": (lambda f: edit(f / CONFIG, r="four"), "r is 'four', and should be a whole number"),
    "rank pattern of text": (
        lambda f: edit(f / CONFIG, rank_pattern="q"),
        "rank_pattern is 'q', and should be an object",
    ),
    "a broken pattern": (lambda f: edit(f / CONFIG, alpha_pattern={"(": 2}), "is no pattern"),
    "an alpha of nothing": (lambda f: edit(f / CONFIG, lora_alpha=-1), "alpha: got -1"),
    "a dropout of everything": (lambda f: edit(f / CONFIG, lora_dropout=1), "dropout: got 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(folder: Path, damage: str) -> None:
    """A truncated, mixed or foreign file ends in a traceback, or loads as something it is not."""
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(cg.errors.AdapterError, match=message) as caught:
        cg.read_adapter(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)


def test_an_alpha_edited_by_hand_counts(folder: Path, tiny_hf: nn.Module) -> None:
    """A user halves lora_alpha in adapter_config.json: PEFT obeys, clipgraft does not."""
    edit(folder / CONFIG, lora_alpha=3.0, alpha_pattern={})
    cg.load_adapter(tiny_hf, folder)
    assert {round(layer.scaling * layer.r**0.5, 6) for layer in require_lora(tiny_hf).layers.values()} == {
        3.0
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_is_read_or_refused(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A configuration that some other tool wrote ends in a traceback."""
    folder = shutil.copytree(saved, tmp_path / "adapter", dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from([CONFIG, NATIVE]))
    content = json.loads((saved / path.name).read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=2)):
        content[key] = data.draw(json_values)
    path.write_text(json.dumps(content))
    try:
        cg.read_adapter(folder)
    except cg.errors.AdapterError as error:
        message = str(error)
    else:
        return
    assert len(message.splitlines()) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_read_or_refused(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A weights file with flipped or missing bytes ends in a traceback, or is taken for the saved one."""
    folder = shutil.copytree(saved, tmp_path / "adapter", dirs_exist_ok=True)
    content = bytearray((saved / WEIGHTS).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    (folder / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(cg.errors.AdapterError, match=r"truncated or damaged|is not the file clipgraft\.json"):
        cg.read_adapter(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md", "model.pt"])
def test_a_folder_of_others_is_left(name: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """An adapter that PEFT trained, or a folder of other things, would be written over by a mistyped path."""
    model = adapted(tiny_openclip)
    (tmp_path / name).write_text("precious")
    with pytest.raises(cg.errors.AdapterError, match=r"not made by clipgraft[^\n]+`overwrite=True`$"):
        cg.save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"
    cg.save_adapter(model, tmp_path, overwrite=True)
    cg.save_adapter(model, tmp_path)  # which is ours now
    assert (tmp_path / NATIVE).is_file()
