"""Counting the operations of ViT-B-32 with calflops; `clipgraft profile` joins when it is built."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.child import reset_peak


def by_calflops() -> dict[str, Any]:
    """calflops on the transformers model with random weights, one image and one caption."""
    from calflops import calculate_flops
    from transformers import CLIPConfig, CLIPModel

    reset_peak()
    started = time.perf_counter()
    model = CLIPModel(CLIPConfig()).eval()
    inputs = {
        "input_ids": torch.full((1, 77), 49407),
        "attention_mask": torch.ones(1, 77, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, 224, 224),
    }
    flops, macs, parameters = calculate_flops(
        model, kwargs=inputs, print_results=False, output_as_string=False
    )
    return {
        "seconds": time.perf_counter() - started,
        "flops": float(flops),
        "macs": float(macs),
        "parameters": float(parameters),
    }
