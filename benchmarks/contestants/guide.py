"""The guide's method, written independently: LoRA layers next to open_clip's text attention.

As described there: q, k, v and out each have a layer of their own with its own dropout; both towers run in
every step on captions of 77 tokens; the loader has workers. `cut` is what can be done from outside to make
it faster: shorten the tower once to the longest caption of the table.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.batches import loader
from benchmarks.contestants.loop import adamw, timed_steps
from benchmarks.data import read_table
from benchmarks.prepare import OPENCLIP_BASE, adapter_folder

_ROLES = ("q", "k", "v", "out")


class LoRALayer(nn.Module):
    """Compute x -> dropout -> A (r, in) -> B (out, r) -> alpha / r."""

    def __init__(self, features: int, r: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, features))
        self.lora_B = nn.Parameter(torch.zeros(features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)


def add_lora(model: Any, r: int, alpha: float, dropout: float) -> None:
    """Freeze the model and add four layers to every text block."""
    model.requires_grad_(False)
    for block in model.transformer.resblocks:
        for role in _ROLES:
            setattr(block, f"lora_{role}", LoRALayer(block.attn.embed_dim, r, alpha, dropout))
        block.forward = functools.partial(_block_forward, block)


def _block_forward(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    attention = block.attn
    normed = block.ln_1(x)
    base = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    layers = (block.lora_q, block.lora_k, block.lora_v)
    q, k, v = (
        _heads(part + lora(normed), attention.num_heads) for part, lora in zip(base, layers, strict=True)
    )
    mask = attn_mask.to(q.dtype) if attn_mask is not None else None
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    out = F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias) + block.lora_out(mixed)
    x = x + block.ls_1(out)
    result: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return result


def _heads(x: Tensor, heads: int) -> Tensor:
    rows, tokens, width = x.shape
    return x.view(rows, tokens, heads, width // heads).transpose(1, 2)


def load_weights(model: Any, folder: Path) -> None:
    """Load the adapter that all contestants start from."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    for number, block in enumerate(model.transformer.resblocks):
        for role in _ROLES:
            path = f"base_model.model.text_model.encoder.layers.{number}.self_attn.{role}_proj"
            layer = getattr(block, f"lora_{role}")
            layer.lora_A.data.copy_(weights[f"{path}.lora_A.weight"])
            layer.lora_B.data.copy_(weights[f"{path}.lora_B.weight"])


def cut_context(model: Any, length: int) -> None:
    """Shorten the text tower to `length` tokens."""
    model.positional_embedding = nn.Parameter(model.positional_embedding[:length].detach().clone(), False)
    model.attn_mask = model.attn_mask[:length, :length]


def train_text(
    table: str,
    *,
    batch_size: int,
    warmup: int,
    steps: int,
    autocast: bool = False,
    cut: bool = False,
    workers: int = 4,
    dropout: float = 0.1,
    rows: int | None = None,
) -> dict[str, Any]:
    """Train LoRA on the text tower with the guide's method."""
    import open_clip
    from open_clip.loss import ClipLoss

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(OPENCLIP_BASE))
    add_lora(model, 16, 16, dropout)
    load_weights(model, adapter_folder("text-attention", dropout))
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    data = read_table(Path(table))[:rows]
    length = 77
    if cut:
        length = int(tokenize([caption for _, caption in data]).argmax(-1).max()) + 1
        cut_context(model, length)

    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        images, captions = zip(*samples, strict=True)
        return torch.stack(images), tokenize(list(captions))[:, :length]

    loss = ClipLoss()
    model.train()
    torch.manual_seed(0)
    return timed_steps(
        loader(data, preprocess, collate, batch_size=batch_size, workers=workers),
        lambda batch: loss(*model(*batch)),
        adamw(model),
        warmup=warmup,
        steps=steps,
        autocast=autocast,
    )


def encode(
    images: list[str], batch_size: int = 64, autocast: bool = False, reference: bool = False
) -> dict[str, Any]:
    """Encode as the guide does: open, convert and transform each image, then encode the batch."""
    import open_clip
    from PIL import Image

    from benchmarks.contestants.encoding import timed_encoding

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(OPENCLIP_BASE))
    model.eval()

    def run(paths: list[str]) -> Tensor:
        features = []
        for start in range(0, len(paths), batch_size):
            batch = [
                preprocess(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]
            ]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                part = model.encode_image(torch.stack(batch)).float()
            features.append(part / part.norm(dim=-1, keepdim=True))
        return torch.cat(features)

    return timed_encoding(run, images, reference)
