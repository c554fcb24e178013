"""transformers + PEFT: `CLIPModel` with its own loss, the processor in the loader's workers, LoRA by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.batches import loader
from benchmarks.contestants.loop import adamw, timed_steps
from benchmarks.data import read_table
from benchmarks.prepare import HF_BASE, adapter_folder


def load_model(base: Path, adapter: Path, *, bf16: bool, attention: str) -> Any:
    """Load a PeftModel with the adapter that every contestant starts from."""
    from peft import PeftModel
    from transformers import CLIPModel

    dtype = torch.bfloat16 if bf16 else torch.float32
    model = CLIPModel.from_pretrained(base, dtype=dtype, attn_implementation=attention)
    return PeftModel.from_pretrained(
        model, adapter, is_trainable=True, autocast_adapter_dtype=not bf16
    ).train()


def batches(
    base: Path, data: list[tuple[Path, str]], *, batch_size: int, workers: int, longest: bool, bf16: bool
) -> Any:
    """Yield batches of pixels and token ids, padded to 77 or to the longest caption of the batch."""
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    dtype = torch.bfloat16 if bf16 else torch.float32

    def pixels(image: Any) -> Tensor:
        found: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return found

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        images, captions = zip(*samples, strict=True)
        padding = "longest" if longest else "max_length"
        tokens = tokenizer(list(captions), padding=padding, truncation=True, return_tensors="pt")
        return {"pixel_values": torch.stack(images).to(dtype), **tokens}

    return loader(data, pixels, collate, batch_size=batch_size, workers=workers)


def train(
    table: str,
    *,
    targets: str,
    batch_size: int,
    warmup: int,
    steps: int,
    autocast: bool = False,
    bf16: bool = False,
    longest: bool = False,
    attention: str = "sdpa",
    workers: int = 2,
    dropout: float = 0.1,
    rows: int | None = None,
) -> dict[str, Any]:
    """Train LoRA with PEFT on the sites of `targets`, one of those that `prepare` made an adapter for."""
    model = load_model(HF_BASE, adapter_folder(targets, dropout), bf16=bf16, attention=attention)
    data = batches(
        HF_BASE,
        read_table(Path(table))[:rows],
        batch_size=batch_size,
        workers=workers,
        longest=longest,
        bf16=bf16,
    )
    torch.manual_seed(0)
    return timed_steps(
        data,
        lambda batch: model(**batch, return_loss=True).loss,
        adamw(model),
        warmup=warmup,
        steps=steps,
        autocast=autocast,
    )
