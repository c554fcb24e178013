"""Every format by one door: told apart, read and written; strangers' files run no code and break nothing."""

from __future__ import annotations

import copy
import io
import os
import pickle
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import clipgraft as cg
from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.convert import Form, detect, read_any, write_any
from explicit_lora import explicit_model, features, inputs, largest, randomise_lora
from guide_lora import deltas, updates_of
from tiny_models import to_transformers

FORMS: tuple[Form, ...] = ("peft", "guide", "guide-full", "clip-lora")
LAYERS = {"text_layers": 2, "vision_layers": 2}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def adapter_of(model: nn.Module, folder: Path, **options: Any) -> AdapterFile:
    """A text-attention adapter that every format can hold, read from its folder."""
    carrier = copy.deepcopy(model)
    cg.apply_lora(carrier, **{"r": 4, "alpha": 6, "dropout": 0.1, **options})
    randomise_lora(carrier)
    adapter = cg.read_adapter(cg.save_adapter(carrier, folder, {"acc1": 0.25}))
    return AdapterFile(
        **{**vars(adapter), "base": {"name": "tiny", "pretrained": "x", "family": "open_clip"}}
    )


def write(adapter: AdapterFile, out: Path, form: Form, base: nn.Module) -> Path:
    """`write_any` with all that any form asks for."""
    return write_any(adapter, out, form, base_state_dict=base.state_dict(), **LAYERS)


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_any_format_into_any_other(
    first: Form, second: Form, tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """On its way through two formats an adapter changes what it computes, or forgets where it belongs."""
    adapter = adapter_of(tiny_openclip, tmp_path / "a", rank_pattern={"text.0.q": 2})
    once = read_any(write(adapter, tmp_path / "once", first, tiny_openclip), **LAYERS)
    path = write(once, tmp_path / "twice", second, tiny_openclip)
    assert detect(path) == ("folder" if second == "peft" else second)
    twice = read_any(path, **LAYERS)
    for site, delta in deltas(adapter).items():
        assert (deltas(twice)[site] - delta).abs().max() <= 2**-22 * delta.abs().max()
    for field in ("base", "fingerprint", "logit_scale", "metrics"):
        assert getattr(twice, field) == getattr(adapter, field)
    assert twice.settings.dropout == (0 if "clip-lora" in (first, second) else 0.1)


def test_peft_opens_what_came_from_elsewhere(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """`--to peft` writes a folder that stock PEFT does not open on CLIPModel, or reads wrongly."""
    adapter = adapter_of(tiny_openclip, tmp_path / "a", rank_pattern={"text.0.q": 2})
    foreign = read_any(write(adapter, tmp_path / "x.pt", "guide", tiny_openclip))
    folder = write_any(foreign, tmp_path / "peft", "peft")
    twin = to_transformers(tiny_openclip)
    sample = inputs(tiny_openclip)
    wanted = features(explicit_model(tiny_openclip, updates_of(adapter)), *sample)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(twin), folder).eval()
    assert largest(features(model.base_model.model, *sample), wanted) < 1e-4
    cg.load_adapter(twin, folder)
    assert largest(features(twin, *sample), wanted) < 1e-4


def test_peft_on_open_clip_folders(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A folder of PEFT on open_clip is refused as foreign, or read without asking what is wanted."""
    config = peft.LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(tiny_openclip), config).save_pretrained(tmp_path / "p")
    assert detect(tmp_path / "p") == "peft-openclip"
    with pytest.raises(cg.errors.AdapterError, match="`peft_out_proj="):
        read_any(tmp_path / "p")
    adapter = read_any(tmp_path / "p", peft_out_proj="as-meant")
    assert len(adapter.weights) == 16
    folder = write_any(adapter, tmp_path / "ours", "peft")
    assert cg.read_adapter(folder).fingerprint is None
    cg.load_adapter(tiny_openclip, folder)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def evil_files(folder: Path, planted: Path) -> dict[str, Path]:
    """Files that would run code in a careless reader, in both of torch's layouts and as a bare pickle."""
    state = {"lora_state_dict": {"a": torch.ones(1)}, "lora_config": Evil(planted)}
    paths = {name: folder / f"{name}.pt" for name in ("zip", "legacy", "bare")}
    torch.save(state, paths["zip"])
    torch.save(state, paths["legacy"], _use_new_zipfile_serialization=False)
    paths["bare"].write_bytes(pickle.dumps(Evil(planted)))
    return paths


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_no_code_is_run(kind: str, tmp_path: Path) -> None:
    """An adapter from the internet takes over the machine of whoever converts it."""
    planted = tmp_path / "planted"
    path = evil_files(tmp_path, planted)[kind]
    for function in (detect, read_any):
        with pytest.raises(
            cg.errors.AdapterError, match="pickled code or objects, which are never loaded"
        ) as caught:
            function(path)
        assert "\n" not in str(caught.value)
    assert not planted.exists()
    pickle.loads(pickle.dumps(Evil(planted)))  # the trap itself does work
    assert planted.exists()


def bad_files() -> dict[str, bytes]:
    """File contents that are no checkpoint, by what is wrong with them."""
    stream = io.BytesIO()
    torch.save({"lora_state_dict": {"a": torch.ones(3)}, "lora_config": {}}, stream)
    whole, empty, other, deep = stream.getvalue(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/version", b"3")
    with zipfile.ZipFile(deep, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"(" * 10_000_000 + b".")
        archive.writestr("x/version", b"3")
    return {
        "nothing": b"",
        "text": "không phải là bộ chuyển\n".encode(),
        "truncated": whole[: len(whole) // 2],
        "without its end": whole[:-30],
        "an empty archive": empty.getvalue(),
        "an archive of nothing": other.getvalue(),
        "an archive that swells": deep.getvalue(),
        "a list": pickle.dumps([1, 2]),
        "number keys": pickle.dumps({1: 2}),
        "another dictionary": pickle.dumps({"model": {}}),
        "an empty state": pickle.dumps({"state_dict": {}}),
        "no LoRA": pickle.dumps({"state_dict": {"logit_scale": 1.0}, "lora_config": {}}),
    }


@pytest.mark.parametrize("name", bad_files())
def test_files_that_are_no_adapters(name: str, tmp_path: Path) -> None:
    """A wrong or half-downloaded file ends in a traceback instead of one line that names it."""
    path = tmp_path / "bộ chuyển.pt"
    path.write_bytes(bad_files()[name])
    with pytest.raises(cg.errors.AdapterError) as caught:
        read_any(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@cache
def without_b(legacy: bool) -> bytes:
    """A file that lacks B. Made once: torch's older format writes addresses, which differ in length."""
    stream = io.BytesIO()
    state = {"transformer.resblocks.0.lora_q.lora_A": torch.ones(2, 4)}
    whole = {"lora_state_dict": state, "lora_config": {"r": 2}}
    torch.save(whole, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes(data: Any, tmp_path: Path) -> None:
    """A flipped or missing byte on the way ends in a traceback."""
    content = bytearray(without_b(data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pt").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(cg.errors.AdapterError):  # it lacks B, whatever else happens to it
        read_any(tmp_path / "x.pt")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    """A misspelt path is told as something else."""
    (tmp_path / "empty").mkdir()
    for path, told in (("nothing.pt", "no such file"), ("empty", "an adapter is a folder with")):
        with pytest.raises(cg.errors.AdapterError, match=told):
            read_any(tmp_path / path)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_overwritten(form: Form, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """A conversion destroys what a user has at the place they named."""
    adapter = adapter_of(tiny_openclip, tmp_path / "a")
    full, empty, dangling = tmp_path / "full", tmp_path / "empty", tmp_path / "dangling"
    full.mkdir()
    (full / "thesis.txt").write_text("all of it")
    empty.mkdir()
    dangling.symlink_to(tmp_path / "elsewhere")
    for out in (full, full / "thesis.txt", dangling):
        with pytest.raises(cg.errors.AdapterError, match=r"left as it is|is a folder"):
            write(adapter, out, form, tiny_openclip)
    assert (full / "thesis.txt").read_text() == "all of it"
    if form == "peft":
        assert read_any(write(adapter, empty, form, tiny_openclip)).weights.keys() == adapter.weights.keys()
    else:
        with pytest.raises(cg.errors.AdapterError, match=r"is a folder: name the \.pt file"):
            write(adapter, empty, form, tiny_openclip)


@pytest.mark.parametrize("form", FORMS)
def test_failed_writes_leave_nothing(
    form: Form, tiny_openclip: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves half an adapter that looks like a whole one."""
    adapter = adapter_of(tiny_openclip, tmp_path / "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(cg.errors.WriteError, match=r"cannot write.*no space left on the disk"):
            write(adapter, tmp_path / "out" / "new", form, tiny_openclip)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(cg.errors.WriteError, match="cannot write"):
        write(adapter, tmp_path / "file" / "new", form, tiny_openclip)
