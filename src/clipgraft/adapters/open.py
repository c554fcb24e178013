"""`load` for everything with a path: a base by name, an adapter that brings its base along, or a run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.clip import Clip as Clip
from clipgraft.adapters.convert import read_any
from clipgraft.adapters.folder import is_adapter
from clipgraft.adapters.run_folder import RunModel, find_run_model, is_model_folder, runs_near
from clipgraft.errors import AdapterError, ModelError
from clipgraft.models.clip import Source
from clipgraft.models.load import load as load_base

log = logging.getLogger("clipgraft")


def load(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a base model, an adapter folder together with the base it names, or what a run made, in eval mode.

    Args:
        name: `emoji`, an open_clip name or JSON config, `hf:` and an id or folder, a local model folder,
            or the folder of an adapter or run that clipgraft wrote. A run gives the adapter on its base, or
            the whole model after full fine-tuning or distillation; a cell of a sweep is a run.
        pretrained: for open_clip names and configs: a tag, a local checkpoint, or `none`.
        device: where the model goes.
        precision: type of the weights: `fp32`, `bf16` or `fp16`.
        seed: of random weights.

    Raises:
        ModelError: the base cannot be found, fetched or read.
        AdapterError: the adapter cannot be read or does not fit its base.
        CheckpointError: the run has saved nothing yet, or does not record its base.
    """
    source, adapter, run = _split(str(name), str(pretrained or ""))
    if pretrained and run is not None:
        raise ModelError(f"{name} is a run and brings its own weights: leave out `pretrained` {pretrained}")
    if pretrained and adapter is not None:
        raise AdapterError(
            f"{name} is an adapter and brings its base along: leave out `pretrained` {pretrained}"
        )
    if run is not None:
        _tell_run(run)
    try:
        base = load_base(
            source.name, source.pretrained or None, device=device, precision=precision, seed=seed
        )
    except ModelError as error:
        if adapter is None:
            raise
        raise AdapterError(
            f"{adapter} needs its base (fingerprint {read_any(adapter).fingerprint}): {error}; "
            "if the base is elsewhere, load it from there and then load_adapter"
        ) from error
    clip = Clip.over(base)
    if adapter is not None:
        load_adapter(clip, adapter)
    return clip


def tell_base(name: str, pretrained: str | None, who: str) -> None:
    """Say which base a file from elsewhere makes us load, and where that is, before it is loaded."""
    kind = ""
    if Path(name.removeprefix("hf:")).exists():
        kind = " (on this machine)"
    elif name.startswith(("hf:", "hf-hub:")):
        kind = " (of the Hugging Face hub)"
    whole = f"{name} with weights {pretrained}" if pretrained else name
    # Python shows warnings alone by itself, and a place that somebody else named has to be seen.
    log.log(logging.WARNING if kind else logging.INFO, "base %s%s, as %s names it", whole, kind, who)


def split_adapter(name: str, pretrained: str | None = None) -> tuple[Source, Path | None]:
    """Find the base, or a run's weights, that `load` would load, and the adapter on it if there is one.

    Raises:
        AdapterError: the adapter does not name its base.
        CheckpointError: the run has saved nothing yet.
        ModelError: it is no model, but runs lie there or beside it.
    """
    source, adapter, _ = _split(name, pretrained or "")
    return source, adapter


def _split(name: str, pretrained: str) -> tuple[Source, Path | None, RunModel | None]:
    """`split_adapter`, and the run that the name is of."""
    path = Path(name)
    run = None if path.is_dir() and is_adapter(path) else find_run_model(path)
    if run is not None and run.kind != "adapter":
        return run.weights, None, run
    if run is None and not is_adapter(path):
        _refuse_parents(path)
        return Source(name, pretrained), None, None
    place = path if run is None else run.saved
    base = read_any(place).base
    if not base.get("name"):
        raise AdapterError(
            f"{place} does not say which base it was made for: load that as `model`, this as `adapter`"
        )
    tell_base(base["name"], base.get("pretrained"), f"the adapter {place}")
    return Source(base["name"], base.get("pretrained", "")), place, run


def _tell_run(found: RunModel) -> None:
    """Say what of a run is used, where that is not plain."""
    if found.unfinished is not None:
        log.info(
            "%s has not come to its end: what it saved after epoch %d is used", found.run, found.unfinished
        )
    if found.kind != "adapter" and found.base.name:
        whole = " / ".join(part for part in (found.base.name, found.base.pretrained) if part)
        log.info("%s: a %s model, which began as %s", found.run, found.kind, whole)


def _refuse_parents(path: Path) -> None:
    """Name the runs that are there, for a folder that only holds runs, or for a run that is not there.

    Raises:
        ModelError: there are some.
    """
    if path.is_file() or is_model_folder(path) or not (path.is_dir() or path.parent.name):
        return
    folder = path if path.is_dir() else path.parent
    if near := runs_near(folder):
        shown = " ".join(map(str, near[:6])) + (" …" if len(near) > 6 else "")
        what = "is no model, but a folder that holds" if path.is_dir() else f"is not there; {folder} holds"
        raise ModelError(f"{path} {what} {len(near)} run{'s' * (len(near) > 1)}: name one, like {shown}")
