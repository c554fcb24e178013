"""Count the operations of ViT-B-32 from a cold start: imports, model, count."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.child import reset_peak

_LLAVA = Path(__file__).parents[2] / "examples" / "llava_next_8b.json"


def by_calflops() -> dict[str, Any]:
    """Count with calflops, on the transformers model with random weights, one image and one caption."""
    reset_peak()
    started = time.perf_counter()
    from calflops import calculate_flops
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig()).eval()
    inputs = {
        "input_ids": torch.full((1, 77), 49407),
        "attention_mask": torch.ones(1, 77, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, 224, 224),
    }
    flops, macs, parameters = calculate_flops(
        model, kwargs=inputs, print_results=False, output_as_string=False
    )
    return _values(started, flops, macs, parameters)


def by_clipgraft() -> dict[str, Any]:
    """Count with clipgraft, on the same configuration, without weights."""
    reset_peak()
    started = time.perf_counter()
    from transformers import CLIPConfig, CLIPModel

    from clipgraft.profile.forward import costs

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    profile = costs(model)
    return _values(started, profile.flops, profile.macs, profile.parameters)


def llava_by_clipgraft() -> dict[str, Any]:
    """Count LLaVA-NeXT-8B with clipgraft, from its configuration alone."""
    reset_peak()
    started = time.perf_counter()
    from clipgraft.profile.llava import llava_costs, llava_on_meta

    total = llava_costs(llava_on_meta(_LLAVA)).trace.total
    return _values(started, total.flops, total.macs, total.parameters)


def _values(started: float, flops: float, macs: float, parameters: float) -> dict[str, Any]:
    return {
        "seconds": time.perf_counter() - started,
        "flops": float(flops),
        "macs": float(macs),
        "parameters": float(parameters),
    }
