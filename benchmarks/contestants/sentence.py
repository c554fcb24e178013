"""Encode images with the same CLIP in sentence-transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.encoding import timed_encoding
from benchmarks.prepare import HF_BASE


def encode(images: list[str], batch_size: int = 32, bf16: bool = False) -> dict[str, Any]:
    """Run `SentenceTransformer.encode` on opened files; `bf16` loads the weights in bfloat16."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    options = {"torch_dtype": torch.bfloat16} if bf16 else {}
    model = SentenceTransformer(str(HF_BASE), device="cpu", model_kwargs=options)

    def run(paths: list[str]) -> Tensor:
        found: Tensor = model.encode(
            [Image.open(path) for path in paths],
            batch_size=batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return found.float()

    return timed_encoding(run, images)
