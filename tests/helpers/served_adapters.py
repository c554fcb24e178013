"""Adapters of the emoji base on disk, what they give by other ways, and pictures as bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.adapters.open import Clip
from clipgraft.data.features import image_steps
from clipgraft.lora.state import require_lora

KINDS: dict[str, dict[str, Any]] = {
    "text": {"targets": "text-attention", "r": 4},
    "both": {"targets": "attention", "r": 3},
    "dora": {"targets": "linear", "r": 2, "use_dora": True},
    "biases": {"targets": "text.0.*,vision.1.q", "r": 2, "bias": "all"},
    "vera": {"targets": "linear", "r": 6, "variant": "vera"},
    "warm": {"targets": "text.1.q", "r": 2, "train_logit_scale": True},
}
Vectors = npt.NDArray[np.float32]


def write_adapter(clip: Clip, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write an adapter of random weights; the model is the base again afterwards."""
    cg.apply_lora(clip, **options)
    adapter = require_lora(clip).chosen()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        if options.get("train_logit_scale"):
            clip.logit_scale.fill_(1.5)
    cg.save_adapter(clip, folder)
    cg.remove_lora(clip)
    return folder


def write_adapters(clip: Clip, folder: Path) -> Path:
    """Write one adapter of each kind into subfolders of its name."""
    for seed, (name, options) in enumerate(KINDS.items()):
        write_adapter(clip, folder / name, seed, **options)
    return folder


def picture_bytes(
    seed: int = 0, size: tuple[int, int] = (70, 50), form: str = "PNG", **options: Any
) -> bytes:
    """A picture of random pixels as a file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def merged_features(clip: Clip, folder: Path, strength: float, texts: list[str], content: bytes) -> Vectors:
    """Features of texts and one picture by merged weights and the model's own forward."""
    cg.load_adapter(clip, folder, "it")
    cg.merge_lora(clip, {"it": strength})
    try:
        pixels = image_steps(clip)(Image.open(io.BytesIO(content)).convert("RGB"))[None]
        with torch.no_grad():
            parts = [clip.encode_text(texts, normalize=True), clip.encode_image(pixels, normalize=True)]
        return torch.cat(parts).numpy()
    finally:
        cg.remove_lora(clip)
