"""Write a whole model, in any of the forms of `clipgraft.models.forms`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from clipgraft.errors import ModelError
from clipgraft.files import atomic_folder, path_exists
from clipgraft.models.clip import Clip
from clipgraft.models.convert import require_bare
from clipgraft.models.forms.form import FormSpec, Gate, Job
from clipgraft.models.forms.names import Form
from clipgraft.models.forms.table import FORMS
from clipgraft.models.saved import save_checkpoint, save_transformers_files, weights_size
from clipgraft.ours import FOLDER_MARK, mark_folder, refuse_foreign
from clipgraft.progress import Progress, Told, showing

log = logging.getLogger("clipgraft")


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
    clip: Clip,
    out: Path,
    form: Form,
    progress: Progress = None,
    overwrite: bool = False,
    gate: Gate | None = None,
) -> Written:
    """Write a model without adapters, in the given form; merged weights go out as they are.

    - `open_clip`: where `out` ends in .pt or .safetensors, a checkpoint that `open_clip.create_model(name,
      pretrained=out)` opens; otherwise a folder for `local-dir:` with configuration and tokenizer.
    - `transformers`: a folder for `CLIPModel`, `AutoTokenizer` and `AutoImageProcessor`.
    - `onnx`: a folder with `text.onnx`, `vision.onnx`, a description and the tokenizer (`onnx.py`); of a
      tower alone, with its graph. `onnx-int8`: the same with products in 8-bit integers, if `gate` lets it.
      `openvino`: the same graphs as OpenVINO's IR.
    - `sentence-transformers`: a folder for `SentenceTransformer(out)`.
    - `immich`: a folder for the models of Immich's machine learning.
    - `diffusers`: `text_encoder/` and `tokenizer/` of an image generator; `comfyui`: its text encoder as one
      .safetensors file.

    A model of the other family is converted first. Everything is whole or not there at all; an earlier
    export to the same place is replaced, which it is known for by a record in it.

    Args:
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many) steps. What each step does is logged.
        overwrite: replace whatever is there, unless the model was loaded from it.
        gate: judges `onnx-int8` (`clipgraft.evaluate.graph_gate`), before it gets its final name.

    Raises:
        ModelError: the model carries an adapter or cannot take this form; `out` is not a model that this
            function wrote, holds other things beside it, or is what the model was loaded from.
    """
    if form not in FORMS:
        raise ModelError(f"form '{form}' is unknown: use one of {', '.join(FORMS)}")
    spec = FORMS[form]
    require_bare(clip)
    _check_place(clip, out, form, overwrite)
    spec.require()
    with showing(progress, "writing", "step") as told:
        tell = _Steps(told, spec.steps)
        if spec.write_file is not None and spec.is_file(out):
            spec.write_file(Job(clip, out, tell, gate))
            tell.end()
            return Written((out,))
        assert spec.write is not None
        with atomic_folder(out, weights_size(clip)) as folder:
            differences = spec.write(Job(clip, folder, tell, gate))
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


def _check_place(clip: Clip, out: Path, form: Form, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export of this form, unless told to."""
    spec = FORMS[form]
    source = {clip.source.name.removeprefix("hf:"), clip.source.pretrained} - {"", "emoji"}
    if out.exists() and any(path_exists(name) and out.samefile(name) for name in source):
        raise ModelError(f"{out} is what the model was loaded from: choose another place")
    if out.is_symlink() and not out.exists():
        raise ModelError(f"{out} is a link that leads nowhere: choose another place")
    if spec.write is None and not spec.is_file(out):
        raise ModelError(f"{out}: the {form} form is one file: name it with {' or '.join(spec.suffixes)}")
    if out.is_file() and not spec.is_file(out):
        raise ModelError(f"{out} is a file: the {form} form is a folder; choose another name")
    if not out.is_dir():
        refuse_foreign(out, overwrite, ModelError)
        return
    if spec.is_file(out):
        raise ModelError(f"{out} is a folder: {_file_of(spec)}; choose another name")
    if overwrite:
        return
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in spec.foreign(out) if name != FOLDER_MARK]
    if names and (foreign or not (out / spec.marker).is_file()):
        raise ModelError(
            f"{out} holds {(foreign or names)[0]}, which is no part of a {form} model: choose a new folder, "
            "or say `overwrite=True`"
        )
    refuse_foreign(out, error=ModelError)


def _file_of(spec: FormSpec) -> str:
    return "a checkpoint is a file" if spec.write is not None else "this form is a file"


def save_model(clip: Clip, path: Path, epoch: int) -> Path:
    """Write all weights: a transformers folder `<path>`, else `<path>.pt` as open_clip's checkpoints are.

    Returns:
        What was written.
    """
    if clip.family.name != "transformers":
        target = path.with_name(f"{path.name}.pt")
        save_checkpoint(clip, target, epoch)
        return target
    with atomic_folder(path, weights_size(clip)) as folder:
        save_transformers_files(clip, folder)
    return path


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
