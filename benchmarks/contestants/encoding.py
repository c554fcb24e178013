"""The clock on an encoder of JPEGs, and its features beside the fp32 ones of the guide's loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import reset_peak
from benchmarks.settings import WORK

REFERENCE = WORK / "reference-features.pt"
_WARM = 16


def timed_encoding(
    run: Callable[[list[str]], Tensor], images: list[str], reference: bool = False
) -> dict[str, Any]:
    """Images a second, and the least cosine to the features of the encoder that is the reference."""
    run(images[:_WARM])
    reset_peak()
    started = time.perf_counter()
    features = run(images)
    seconds = time.perf_counter() - started
    if reference:
        torch.save(features, REFERENCE)
    expected = torch.load(REFERENCE, weights_only=True)
    cosine = torch.nn.functional.cosine_similarity(features.float(), expected, dim=-1)
    return {"images_per_second": len(images) / seconds, "cosine": cosine.min().item()}
