"""Write a whole model: for open_clip, for transformers, or for ONNX Runtime."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from clipgraft.errors import ModelError
from clipgraft.files import atomic_folder, atomic_path, path_exists, write_json
from clipgraft.models.clip import Clip
from clipgraft.models.configs import CONFIG_FILE
from clipgraft.models.convert import config_of, require_bare, to_open_clip, to_transformers
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.onnx import DESCRIPTION, require_onnx, write_onnx
from clipgraft.models.processors import HfPreprocess, HfTokenizer, OpenClipTokenizer
from clipgraft.ours import FOLDER_MARK, MARK, mark_folder, refuse_foreign, version_mark
from clipgraft.progress import Progress, Told, showing
from clipgraft.writing import size_of

log = logging.getLogger("clipgraft")
Form = Literal["open_clip", "transformers", "onnx"]

_FILE_SUFFIXES = (".pt", ".safetensors")
_WEIGHTS_FILE = "open_clip_model.safetensors"
_MARKERS: dict[Form, str] = {
    "open_clip": CONFIG_FILE,
    "transformers": "config.json",
    "onnx": DESCRIPTION,
}
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_FILES: dict[Form, tuple[str, ...]] = {
    "open_clip": (_WEIGHTS_FILE,),
    "transformers": ("model*.safetensors*", "*processor_config.json", "generation_config.json"),
    "onnx": ("*.onnx", "*.onnx.data"),
}


@dataclass(frozen=True)
class Written:
    """What `write_model` made.

    Attributes:
        paths: the files, in order.
        differences: for ONNX, of each file from PyTorch: the largest difference over the largest feature.
    """

    paths: tuple[Path, ...]
    differences: dict[str, float] = field(default_factory=dict)


def write_model(
    clip: Clip, out: Path, form: Form, progress: Progress = None, overwrite: bool = False
) -> Written:
    """Write a model without adapters, in the given form; merged weights go out as they are.

    - `open_clip`: where `out` ends in .pt or .safetensors, a checkpoint that `open_clip.create_model(name,
      pretrained=out)` opens; otherwise a folder for `local-dir:` with configuration and tokenizer.
    - `transformers`: a folder for `CLIPModel`, `AutoTokenizer` and `AutoImageProcessor`.
    - `onnx`: a folder with `text.onnx`, `vision.onnx`, a description and the tokenizer (`onnx.py`); of a
      tower alone, with its graph.

    A model of the other family is converted first. Everything is whole or not there at all; an earlier
    export to the same place is replaced, which it is known for by a record in it.

    Args:
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many) steps. What each step does is logged.
        overwrite: replace whatever is there, unless the model was loaded from it.

    Raises:
        ModelError: the model carries an adapter or cannot take this form; `out` is not a model that this
            function wrote, holds other things beside it, or is what the model was loaded from.
    """
    if form not in get_args(Form):
        raise ModelError(f"form '{form}' is unknown: use one of {', '.join(get_args(Form))}")
    require_bare(clip)
    _check_place(clip, out, form, overwrite)
    if form == "onnx":
        require_onnx()
    with showing(progress, "writing", "step") as told:
        tell = _Steps(told, 4 if form == "onnx" else 2)
        if form == "open_clip" and out.suffix in _FILE_SUFFIXES:
            converted = _as_open_clip(clip, tell)
            tell(f"writing {weights_size(clip) / 1e6:,.1f} MB")
            save_checkpoint(converted, out, epoch=0)
            tell.end()
            return Written((out,))
        differences = {}
        with atomic_folder(out, weights_size(clip)) as folder:
            if form == "onnx":
                differences = write_onnx(clip, folder, tell)
            elif form == "transformers":
                _write_transformers(clip, folder, tell)
            else:
                _write_open_clip(_as_open_clip(clip, tell), folder, tell)
            mark_folder(folder, form=form)
        tell.end()
    return Written(tuple(sorted(path for path in out.rglob("*") if path.is_file())), differences)


class _Steps:
    """Logs what begins, and tells how many steps are behind it."""

    def __init__(self, told: Told | None, total: int) -> None:
        self._told = told
        self._total = total
        self._begun = 0

    def __call__(self, line: str) -> None:
        log.info("%s", line)
        if self._told is not None:
            self._told(self._begun, self._total)
        self._begun += 1

    def end(self) -> None:
        """All is done; a step that was not needed counts too."""
        if self._told is not None:
            self._told(self._total, self._total)


def _write_transformers(clip: Clip, folder: Path, tell: _Steps) -> None:
    if clip.family.name != "transformers":
        tell("converting to transformers")
    twin = to_transformers(clip)
    twin.require_inputs()
    tell(f"writing {weights_size(clip) / 1e6:,.1f} MB")
    save_transformers_files(twin, folder)


def _as_open_clip(clip: Clip, tell: _Steps) -> Clip:
    if clip.family.name != "open_clip":
        tell("converting to open_clip")
    return to_open_clip(clip)


def _write_open_clip(clip: Clip, folder: Path, tell: _Steps) -> None:
    clip.require_inputs()
    tell(f"writing {weights_size(clip) / 1e6:,.1f} MB")
    preprocess = dict(clip.model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    preprocess.pop("size", None)  # open_clip takes it from the model
    write_json(folder / CONFIG_FILE, {"model_cfg": config_of(clip), "preprocess_cfg": preprocess})
    save_checkpoint(clip, folder / _WEIGHTS_FILE, epoch=0)
    tokenizer = clip.tokenizer
    if isinstance(tokenizer, OpenClipTokenizer) and hasattr(tokenizer.inner, "save_pretrained"):
        tokenizer.inner.save_pretrained(folder)


def _check_place(clip: Clip, out: Path, form: Form, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export of this form, unless told to."""
    source = {clip.source.name.removeprefix("hf:"), clip.source.pretrained} - {"", "emoji"}
    if out.exists() and any(path_exists(name) and out.samefile(name) for name in source):
        raise ModelError(f"{out} is what the model was loaded from: choose another place")
    is_file = form == "open_clip" and out.suffix in _FILE_SUFFIXES
    if out.is_symlink() and not out.exists():
        raise ModelError(f"{out} is a link that leads nowhere: choose another place")
    if out.is_file() and not is_file:
        raise ModelError(f"{out} is a file: the {form} form is a folder; choose another name")
    if not out.is_dir():
        refuse_foreign(out, overwrite, ModelError)
        return
    if is_file:
        raise ModelError(f"{out} is a folder: a checkpoint is a file; choose another name")
    names = sorted(path.name for path in out.iterdir())
    if overwrite:
        return
    known = (FOLDER_MARK, _MARKERS[form], *_FILES[form], *_TOKENIZER_FILES)
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in known)]
    if names and (foreign or _MARKERS[form] not in names):
        raise ModelError(
            f"{out} holds {(foreign or names)[0]}, which is no part of a {form} model: choose a new folder, "
            "or say `overwrite=True`"
        )
    refuse_foreign(out, error=ModelError)


def save_model(clip: Clip, path: Path, epoch: int) -> Path:
    """Write all weights: `<path>.pt` as open_clip's checkpoints are, or a transformers folder `<path>`.

    Returns:
        What was written.
    """
    if clip.family.name == "open_clip":
        target = path.with_name(f"{path.name}.pt")
        save_checkpoint(clip, target, epoch)
        return target
    with atomic_folder(path, weights_size(clip)) as folder:
        save_transformers_files(clip, folder)
    return path


def save_checkpoint(clip: Clip, target: Path, epoch: int) -> None:
    """The state dict in one file: `.safetensors`, or with epoch and name as open_clip's training writes."""
    state = clip.model.state_dict()
    with atomic_path(target, size_of(state)) as temporary:
        if target.suffix == ".safetensors":
            whole = {name: weight.contiguous() for name, weight in state.items()}
            save_file(whole, temporary, metadata={"format": "pt", MARK: version_mark()})
        else:
            made = {"epoch": epoch, "name": clip.source.name, MARK: version_mark()}
            torch.save({**made, "state_dict": state}, temporary)


def save_transformers_files(clip: Clip, folder: Path) -> None:
    """A transformers model with its tokenizer and image processor, as far as it has them."""
    with quiet_libraries():
        clip.model.save_pretrained(folder)  # type: ignore[operator]
    if isinstance(clip.tokenizer, HfTokenizer):
        clip.tokenizer.inner.save_pretrained(folder)
    if isinstance(clip.preprocess, HfPreprocess):
        clip.preprocess.processor.save_pretrained(folder)


def weights_size(clip: Clip) -> int:
    """Bytes of a model's weights: nearly what a file of them needs."""
    return size_of(clip.model.state_dict())


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
