"""`load` for everything with a path: a base by name, an adapter that brings its base along, or a run.

It returns a `Clip` as users hold it, with adapters by row and the guide's functions as methods.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.convert import read_any
from clipgraft.adapters.folder import is_adapter, lora_state_dict, save_adapter
from clipgraft.adapters.hub import HUB, find_adapter, is_repository
from clipgraft.adapters.run_folder import RunModel, find_run_model, is_model_folder, runs_near
from clipgraft.engine.encoder import Names, encode_rows
from clipgraft.errors import AdapterError, ModelError
from clipgraft.lora.control import disable_lora, enable_lora, merge_lora, unmerge_lora
from clipgraft.lora.inject import apply_lora
from clipgraft.lora.state import count_parameters, require_lora, verify_gradients
from clipgraft.lora.targets import guide_targets
from clipgraft.models.clip import Clip as BaseClip
from clipgraft.models.clip import ClipLike, Images, Source, unit_norm
from clipgraft.models.device import queued
from clipgraft.models.load import load as load_base

log = logging.getLogger("clipgraft")


def apply_lora_to_text_encoder(
    model: ClipLike,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
) -> int:
    """`apply_lora` on the text tower by the guide's module names; returns how many blocks carry LoRA."""
    targets = guide_targets(("in_proj", "out_proj") if target_modules is None else target_modules)
    apply_lora(model, r=r, alpha=lora_alpha, dropout=lora_dropout, targets=targets)
    return len({site.block for site in require_lora(model).layers})


def get_lora_state_dict(model: ClipLike) -> dict[str, Tensor]:
    """`lora_state_dict`."""
    return lora_state_dict(model)


def save_lora_adapters(model: ClipLike, path: str | Path) -> Path:
    """`save_adapter`."""
    return save_adapter(model, path)


def load_lora_adapters(model: ClipLike, path: str | Path) -> AdapterFile:
    """`load_adapter`."""
    return load_adapter(model, path)


class Clip(BaseClip):
    """A CLIP model that carries adapters: what `clipgraft.load` returns.

    To `models.clip.Clip` it adds batches whose rows run with different adapters, and the guide's names of
    functions as methods. Both stand above `models`, which knows nothing of adapters.
    """

    @classmethod
    def over(cls, base: BaseClip) -> Clip:
        """The same model as one that carries adapters."""
        return cls(**vars(base))

    apply_lora_to_text_encoder = apply_lora_to_text_encoder
    enable_lora = enable_lora
    disable_lora = disable_lora
    merge_lora = merge_lora
    unmerge_lora = unmerge_lora
    count_parameters = count_parameters
    verify_gradients = verify_gradients
    get_lora_state_dict = get_lora_state_dict
    save_lora_adapters = save_lora_adapters
    load_lora_adapters = load_lora_adapters

    def encode_image(self, images: Images, normalize: bool = False, adapters: Names | None = None) -> Tensor:
        """Pictures, paths, or (N, 3, H, W) preprocessed pixels -> (N, D) features, unit-norm if `normalize`.

        Args:
            images: as in `models.clip.Clip.encode_image`.
            normalize: divide by the norm.
            adapters: which adapter each row runs with: N names of loaded ones, None for the base; or one name
                for all. Without gradients then. By default the active adapter runs.

        Raises:
            AdapterError: no adapter of that name, or not one name a row.
            DataError: a file is no image that can be read.
        """
        if adapters is None:
            return super().encode_image(images, normalize)
        pixels = queued(self.pixels(images).to(self.dtype), self.device)
        features = encode_rows(self, "vision", pixels, adapters)
        return unit_norm(features) if normalize else features

    def encode_text(
        self,
        texts: Tensor | str | Sequence[str],
        normalize: bool = False,
        adapters: Names | None = None,
    ) -> Tensor:
        """Strings or (N, L) token ids -> (N, D) features; arguments and errors as in `encode_image`."""
        if adapters is None:
            return super().encode_text(texts, normalize)
        ids = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        features = encode_rows(self, "text", self.cut_tokens(ids), adapters)
        return unit_norm(features) if normalize else features


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
            or the folder of an adapter or run that clipgraft wrote. An adapter on the hub is `OWNER/NAME`,
            with or without `hf:`. A run gives the adapter on its base, or
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
    path = _on_hub(name) or Path(name)
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


def _on_hub(name: str) -> Path | None:
    """Find an adapter on the hub by OWNER/NAME, with or without `hf:`; None for whatever else it may be.

    Without `hf:` nothing is asked of the hub where the name may be that of a local folder or of a model.
    """
    repository = name.removeprefix(HUB)
    if not is_repository(repository) or Path(repository).exists():
        return None
    if repository == name:
        import open_clip

        known = open_clip.get_model_config(name.replace("/", "-")) is not None
        if known or Path(name).parent.is_dir() or Path(name).suffix:
            return None
    return find_adapter(repository)


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
