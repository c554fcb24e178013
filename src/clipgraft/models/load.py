"""`load`: from a name, id, folder or checkpoint to a `Clip`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from clipgraft.errors import ModelError
from clipgraft.models import load_openclip
from clipgraft.models.clip import Clip
from clipgraft.models.configs import CONFIG_FILE
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.load_hf import load_hf

log = logging.getLogger("clipgraft")
EMOJI_BASE = Path(__file__).parent.parent / "assets" / "emoji" / "base"
_WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a base model with its tokenizer and preprocessing, in eval mode.

    Args:
        name: `emoji` (shipped with clipgraft), an open_clip model name (`ViT-B-32`) or open_clip JSON
            model config, `hf:` and a hub id or folder, `hf-hub:` and the hub id of an open_clip model, or a
            local transformers or open_clip folder.
        pretrained: for open_clip names and configs: a tag (`laion2b_s34b_b79k`), a local checkpoint
            (`.pt`, `.safetensors`), or `none` for random weights. The others bring their own weights.
        device: where the model goes.
        precision: type of the weights, `fp32`, `bf16` or `fp16`.
        seed: of random weights.

    Raises:
        ModelError: nothing of that name can be found, fetched or read.
    """
    if precision not in _WEIGHT_DTYPES:
        raise ModelError(f"precision '{precision}' is unknown: use one of {', '.join(_WEIGHT_DTYPES)}")
    with quiet_libraries():
        clip = _dispatch(str(name), str(pretrained or ""), seed)
    for note in clip.notes:
        log.warning("%s", note)
    if precision == "fp16":
        _ = clip.fingerprint  # fp16 drops bits that the fingerprint of fp32 and bf16 weights counts
    clip.model.to(device=device, dtype=_WEIGHT_DTYPES[precision])
    return clip.eval()


def _dispatch(name: str, pretrained: str, seed: int) -> Clip:
    path = Path(name)
    brings_weights = name == "emoji" or name.startswith(("hf:", "hf-hub:")) or path.is_dir()
    if brings_weights and pretrained:
        if load_openclip.is_openclip(name) and Path(pretrained).is_file():
            return load_openclip.with_weights(_dispatch(name, "", seed), pretrained)
        raise ModelError(f"'{name}' brings its own weights: leave out `pretrained` {pretrained}")
    if name == "emoji":
        return load_hf(str(EMOJI_BASE), name)
    if name.startswith("hf:"):
        return load_hf(name.removeprefix("hf:"), name)
    if path.is_dir():
        return _load_folder(path, name)
    if path.suffix in load_openclip.CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"'{name}' is a checkpoint and does not say which architecture it is for: "
            f"give the model's name and the file apart, e.g. `model='ViT-B-32'` and `pretrained='{name}'`"
        )
    if path.suffix == ".json":
        return load_openclip.load_config(path, pretrained, seed)
    return load_openclip.load_name(name, pretrained, seed)


def _load_folder(folder: Path, name: str) -> Clip:
    if (folder / CONFIG_FILE).is_file():
        return load_openclip.load_folder(folder, name)
    if (folder / "config.json").is_file():
        return load_hf(name, name)
    raise ModelError(
        f"{folder} holds neither config.json (transformers) nor {CONFIG_FILE} (open_clip): "
        "point at the folder that has one of them"
    )
