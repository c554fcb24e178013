"""Compare gradients of one batch, LoRA in both towers, between clipgraft and PEFT, from the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.hf_peft import load_model
from benchmarks.contestants.ours import load
from benchmarks.prepare import HF_BASE, LORA


def compare(table: str, rows: int) -> dict[str, Any]:
    """Return the largest difference relative to the largest gradient of the same matrix."""
    import clipgraft as cg
    from clipgraft.train.recipes.pair_losses import SoftmaxLoss

    clip = load()
    cg.apply_lora(clip, **LORA, dropout=0.0, targets="attention")
    torch.manual_seed(1)
    for name, weight in clip.model.named_parameters():
        if "lora_B" in name:  # zero in a fresh adapter, where every gradient of A would be zero
            torch.nn.init.normal_(weight, std=0.02)
    pairs = cg.read_pairs(table, verify="header")
    captions = [texts[0] for texts in pairs.captions[:rows]]
    pixels = torch.stack([clip.require_preprocess()(_open(path)) for path in pairs.images[:rows]])
    ids = torch.arange(rows)
    pair_loss = SoftmaxLoss(clip.logit_scale)
    loss = pair_loss(clip.encode_image(pixels), clip.encode_text(captions), ids, ids)
    loss.backward()  # type: ignore[no-untyped-call]

    with tempfile.TemporaryDirectory() as folder:
        weights = cg.save_adapter(clip, Path(folder) / "weights")
        theirs = load_model(HF_BASE, weights, bf16=False, attention="sdpa")
        for _, weight in clip.model.named_parameters():
            if weight.grad is not None:
                weight.data = weight.grad
        gradients = cg.save_adapter(clip, Path(folder) / "gradients")
        expected = _read(gradients)
    their_loss = theirs(input_ids=clip.tokenize(captions), pixel_values=pixels, return_loss=True).loss
    their_loss.backward()
    found = {
        name.replace(".default", ""): weight.grad
        for name, weight in theirs.named_parameters()
        if weight.grad is not None
    }
    if found.keys() != expected.keys():
        raise ValueError(f"the two train different matrices: {sorted(found.keys() ^ expected.keys())[:3]}")
    worst = max(
        ((expected[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in found.items()
    )
    return {
        "matrices": len(found),
        "largest_relative_difference": worst,
        "loss_difference": abs(loss.item() - their_loss.item()),
    }


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))
