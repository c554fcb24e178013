"""Rows of many adapters in one batch through the text tower, by PEFT; ours joins when it is built."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.child import reset_peak
from benchmarks.prepare import HF_BASE, adapter_folder

_ROWS, _TOKENS = 64, 16


def by_peft(adapters: int, times: int) -> dict[str, Any]:
    """Seconds of the text tower on 64 rows: the base alone, and with `adapters` adapters in turn."""
    from peft import PeftConfig, get_peft_model
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(HF_BASE).eval()
    ids = torch.full((_ROWS, _TOKENS), 320)
    ids[:, 0], ids[:, -1] = 49406, 49407
    reset_peak()
    with torch.inference_mode():
        base = _seconds(lambda: model(input_ids=ids), times)
    config = PeftConfig.from_pretrained(adapter_folder("text-attention", 0.0))
    mixed = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, adapters):
        mixed.add_adapter(f"a{number}", config)
    names = [f"a{row % adapters}" for row in range(_ROWS)]
    mixed.eval()
    with torch.inference_mode():
        together = _seconds(lambda: mixed(input_ids=ids, adapter_names=names), times)
    return {"base_seconds": base, "mixed_seconds": together}


def _seconds(run: Any, times: int) -> list[float]:
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds
