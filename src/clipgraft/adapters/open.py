"""`load` for everything with a path: a base by name, or an adapter that brings its base along."""

from __future__ import annotations

from pathlib import Path

import torch

from clipgraft.adapters import guide as _guide  # noqa: F401 - gives Clip the guide's methods
from clipgraft.adapters.folder import is_adapter
from clipgraft.adapters.loading import load_adapter
from clipgraft.adapters.native import read_adapter
from clipgraft.engine import rows as _rows  # noqa: F401 - gives Clip batches of several adapters
from clipgraft.errors import AdapterError, ModelError
from clipgraft.models.clip import Clip as Clip
from clipgraft.models.load import load as load_base


def load(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a base model, or an adapter folder together with the base it names, in eval mode.

    Args:
        name: `emoji`, an open_clip name or JSON config, `hf:` and an id or folder, a local model folder,
            or the folder of an adapter or run that clipgraft wrote.
        pretrained: for open_clip names and configs: a tag, a local checkpoint, or `none`.
        device: where the model goes.
        precision: type of the weights: `fp32`, `bf16` or `fp16`.
        seed: of random weights.

    Raises:
        ModelError: the base cannot be found, fetched or read.
        AdapterError: the adapter cannot be read or does not fit its base.
    """
    if not Path(name).is_dir() or not is_adapter(name):
        return load_base(name, pretrained, device=device, precision=precision, seed=seed)
    if pretrained:
        raise AdapterError(
            f"{name} is an adapter and brings its base along: leave out --pretrained {pretrained}"
        )
    adapter = read_adapter(name)
    if not adapter.base.get("name"):
        raise AdapterError(
            f"{name} does not say which base it was made for: load the base, then call load_adapter on it"
        )
    try:
        clip = load_base(
            adapter.base["name"], adapter.base["pretrained"], device=device, precision=precision, seed=seed
        )
    except ModelError as error:
        raise AdapterError(
            f"{name} needs its base (fingerprint {adapter.fingerprint}): {error}; "
            "if the base is elsewhere, load it from there and then load_adapter"
        ) from error
    load_adapter(clip, name)
    return clip
