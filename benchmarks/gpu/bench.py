"""Sizes of a run on a GPU, its clock, and the models that all contestants start from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.prepare import HF_BASE, OPENCLIP_BASE, adapter_folder
from benchmarks.settings import WORK

Values = dict[str, Any]
TEXT, BOTH = "text-attention", "attention"


@dataclass(frozen=True)
class Bench:
    """A device, and the sizes of everything that runs on it.

    Attributes:
        images, batch, epochs: of training from files, and of encoding.
        batches: sizes of a training step whose batch lies in the device's memory.
        warmup, steps: untimed and timed steps.
        mixed_rows: rows of a batch of several adapters.
        adapters: how many of them, each a column; PEFT takes part up to `peft_adapters`.
        rounds: of mixed batches.
        resident: images of a batch that is encoded from the device's memory.
    """

    device: str = "cuda"
    images: int = 4096
    batch: int = 256
    epochs: int = 6
    batches: tuple[int, ...] = (64, 256, 1024, 4096)
    warmup: int = 4
    steps: int = 12
    mixed_rows: int = 1024
    adapters: tuple[int, ...] = (1, 2, 8, 32, 256, 1024)
    peft_adapters: int = 32
    rounds: int = 20
    resident: int = 1024

    @property
    def photos(self) -> Path:
        return WORK / f"photos-{self.images}-0"

    @property
    def table(self) -> Path:
        return self.photos / "natural.csv"

    @property
    def reference(self) -> Path:
        """File of the features that open_clip computes in fp32."""
        return WORK / f"gpu-reference-{self.images}.pt"

    def now(self) -> float:
        """Return the time when the device has finished all work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Values:
        return {"peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else 0}


SMOKE = Bench(
    device="cpu",
    images=8,
    batch=4,
    epochs=2,
    batches=(2, 4),
    warmup=1,
    steps=2,
    mixed_rows=4,
    adapters=(1, 4),
    peft_adapters=1,
    rounds=1,
    resident=2,
)
"""Every line of every contestant runs on a CPU, to see that it does; the numbers say nothing."""


def our_clip(bench: Bench) -> Any:
    import clipgraft as cg

    return cg.load("ViT-B-32", pretrained=OPENCLIP_BASE, device=bench.device)


def compiled(encoder: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Make `encode_text` and `encode_image` of the engine with its towers compiled.

    Packing, and preparing a pass, stay out of the compiler: they are Python and NumPy.
    """
    from clipgraft.engine import towers

    run_text, run_vision = torch.compile(towers.run_text), torch.compile(towers.run_vision)
    return (
        lambda ids: run_text(encoder._text, encoder.pack(ids), encoder._run()),
        lambda pixels: run_vision(encoder._vision, pixels, encoder._run()),
    )


def peft_model(bench: Bench, targets: str, bf16: bool) -> Any:
    from benchmarks.contestants.hf_peft import load_model

    model = load_model(HF_BASE, adapter_folder(targets, 0.1), bf16=bf16, attention="sdpa")
    return model.to(bench.device)


def repeated(batch: Any) -> Iterator[Any]:
    while True:
        yield batch
