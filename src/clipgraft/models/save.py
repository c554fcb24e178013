"""Whole models on disk, in the form their own library opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from clipgraft.files import atomic_path
from clipgraft.models.clip import Clip
from clipgraft.models.from_hf import HfPreprocess
from clipgraft.models.quiet import quiet
from clipgraft.models.tokenizers import HfTokenizer


def save_model(clip: Clip, path: Path, epoch: int) -> Path:
    """Write all weights: `<path>.pt` as open_clip's checkpoints are, or a transformers folder `<path>`.

    Returns:
        What was written.
    """
    if clip.family.name == "open_clip":
        target = path.with_name(f"{path.name}.pt")
        state = {"epoch": epoch, "name": clip.source.name, "state_dict": clip.model.state_dict()}
        with atomic_path(target) as temporary:
            torch.save(state, temporary)
        return target
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet():
        clip.model.save_pretrained(temporary)  # type: ignore[operator]
    if isinstance(clip.tokenizer, HfTokenizer):
        clip.tokenizer.inner.save_pretrained(temporary)
    if isinstance(clip.preprocess, HfPreprocess):
        clip.preprocess.processor.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
