"""Time an encoder of JPEGs, and compare its features with those of the guide's loop in fp32."""

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
    """Return images a second, and the smallest cosine to the reference features."""
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
