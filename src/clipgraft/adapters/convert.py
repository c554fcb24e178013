"""Every adapter format by one door: what a path holds, read as an `AdapterFile`, and written as another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.checkpoint import read_checkpoint
from clipgraft.adapters.clip_lora import read_clip_lora, write_clip_lora
from clipgraft.adapters.diffusion import read_diffusion, trainer_of
from clipgraft.adapters.folder import FILES, Contents, as_adapter, is_adapter, read_folder, write_adapter
from clipgraft.adapters.guide_format import read_guide, write_guide, write_guide_full
from clipgraft.adapters.hub import HUB, fetch_adapter, is_repository
from clipgraft.adapters.peft import is_in_names_of
from clipgraft.adapters.peft_openclip import OutProj, is_peft_openclip, read_peft_openclip
from clipgraft.adapters.run_folder import find_run_model
from clipgraft.errors import AdapterError
from clipgraft.files import atomic_folder
from clipgraft.models.names import CLIP, Twin

Format = Literal["folder", "peft-openclip", "guide", "guide-full", "clip-lora", "kohya", "diffusers"]
Form = Literal["peft", "guide", "guide-full", "clip-lora"]


def detect(path: str | Path) -> Format:
    """What kind of adapter a path holds.

    Returns:
        `folder`, an adapter folder of clipgraft or of PEFT on transformers; `peft-openclip`, one of PEFT on
        an open_clip model; `guide` and `guide-full`, the guide's `.pt` files; `clip-lora`, one of
        MaxZanella/CLIP-LoRA; `kohya` and `diffusers`, LoRA of a text encoder beside an image generator.

    Raises:
        AdapterError: nothing is there, or it is none of these.
    """
    path = adapter_place(_local(str(path)))
    if _is_folder(path):
        contents = read_folder(path)
        return "peft-openclip" if _is_peft_openclip(contents) else "folder"
    if path.suffix == ".safetensors":
        return trainer_of(path)
    return _detect_file(read_checkpoint(path), path)


def _local(path: str) -> Path:
    """Return a path as it is, and the folder in the local cache for what is named on the hub."""
    repository = path.removeprefix(HUB)
    fetched = path.startswith(HUB) and is_repository(repository) and not Path(repository).exists()
    return fetch_adapter(repository) if fetched else Path(path)


def read_any(
    path: str | Path,
    name: str | None = None,
    *,
    peft_out_proj: OutProj | None = None,
    text_layers: int | None = None,
    vision_layers: int | None = None,
    twin: Twin = CLIP,
) -> AdapterFile:
    """Read an adapter of any format that `detect` knows.

    Args:
        path: the folder or file, or `hf:OWNER/NAME` on the hub.
        name: which one, of a folder that holds several in subfolders.
        peft_out_proj: see `read_peft_openclip`.
        text_layers: see `read_clip_lora`.
        vision_layers: see `read_clip_lora`.
        twin: the names of the base at hand, for adapters in those of the base itself.

    Raises:
        AdapterError: it cannot be read, or what the file leaves open has to be said.
    """
    path = adapter_place(_local(str(path)))
    if _is_folder(path):
        contents = read_folder(path, name)
        if _is_peft_openclip(contents) and not is_in_names_of(contents.tensors, twin):
            return read_peft_openclip(contents.tensors, contents.config, contents.folder, peft_out_proj)
        return as_adapter(contents, twin)
    if path.suffix == ".safetensors":
        return read_diffusion(path, text_layers)
    data = read_checkpoint(path)
    if _detect_file(data, path) == "clip-lora":
        return read_clip_lora(data, path, text_layers, vision_layers)
    return read_guide(data, path)


def adapter_place(path: Path) -> Path:
    """Where the adapter of a run lies, or of a sweep's cell; any other path is as it was.

    Raises:
        AdapterError: the run made no adapter.
    """
    found = None if is_adapter(path) else find_run_model(path)
    if found is None:
        return path
    if found.kind == "adapter":
        return found.saved
    raise AdapterError(f"{path} is a run that made no adapter, but a {found.kind} model: name it as `model`")


def _is_peft_openclip(contents: Contents) -> bool:
    """Whether PEFT wrote it; clipgraft's own files, of open_clip models too, have a record."""
    return contents.record is None and is_peft_openclip(contents.tensors, contents.config)


def _is_folder(path: Path) -> bool:
    return path.is_dir() or path.name in FILES


def _detect_file(data: Mapping[str, Any], path: Path) -> Format:
    if "lora_state_dict" in data:
        return "guide"
    if "weights" in data and "metadata" in data:
        return "clip-lora"
    if "state_dict" in data:
        return "guide-full"
    raise AdapterError(
        f"{path} is no adapter that clipgraft reads: those of the guide hold lora_state_dict or state_dict, "
        "those of CLIP-LoRA weights and metadata; check the path"
    )


def check_free(out: str | Path, form: Form, overwrite: bool = False) -> None:
    """Make sure that writing to `out` destroys nothing.

    Raises:
        AdapterError: something is there already.
    """
    out = Path(out)
    if out.is_dir() and form != "peft":
        raise AdapterError(f"{out} is a folder: name the .pt file to write")
    if out.is_dir() and not any(out.iterdir()):
        return
    if overwrite and out.is_file() != (form == "peft"):
        return
    if out.exists() or out.is_symlink():
        raise AdapterError(
            f"{out} exists already and is left as it is: choose another path, or say `overwrite=True`"
        )


def write_any(
    adapter: AdapterFile,
    out: str | Path,
    form: Form,
    *,
    base_state_dict: Mapping[str, Tensor] | None = None,
    text_layers: int | None = None,
    vision_layers: int | None = None,
    epoch: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write an adapter in another format, whole or not at all, where nothing is yet.

    Args:
        adapter: what to write.
        out: a folder for `peft`, else a `.pt` file.
        form: the format.
        base_state_dict: weights of the open_clip base, for `guide-full`.
        text_layers: see `write_clip_lora`.
        vision_layers: see `write_clip_lora`.
        epoch: what the guide's files say they were saved after.
        overwrite: replace what is there.

    Raises:
        AdapterError: `out` is taken, the format cannot hold the adapter, or writing fails.
    """
    out = Path(out)
    check_free(out, form, overwrite)
    if form == "peft":
        with atomic_folder(out) as temporary:
            write_adapter(adapter, temporary)
        return out
    if form == "guide":
        return write_guide(adapter, out, epoch)
    if form == "clip-lora":
        return write_clip_lora(adapter, out, text_layers, vision_layers)
    if base_state_dict is None:
        raise AdapterError("guide-full holds the base's weights: pass base_state_dict")
    return write_guide_full(adapter, base_state_dict, out, epoch)
