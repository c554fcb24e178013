"""Weights of a model as files: a checkpoint of open_clip, or a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from clipgraft.files import atomic_path
from clipgraft.models.clip import Clip
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.processors import HfPreprocess, HfTokenizer
from clipgraft.ours import MARK, version_mark
from clipgraft.writing import size_of


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
