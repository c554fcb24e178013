"""SigLIP-B/16 with random weights: steps of LoRA in one tower or in both, by clipgraft and by PEFT.

Batches lie in memory, and images of a frozen tower are features that are known before, for both: what is
timed is the model alone, with the sigmoid loss of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants.loop import adamw, timed_steps

VOCABULARY, LENGTH, DIM, SIZE = 32_000, 64, 768, 224
RANK = 16
_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
Batch = tuple[Tensor, Tensor]


@cache
def base() -> Any:
    """`SiglipModel` of the size of google/siglip-base-patch16-224, whose weights are drawn."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    return SiglipModel(SiglipConfig()).eval()


def batches(rows: int, towers: str, dtype: torch.dtype) -> Iterator[Batch]:
    """Pixels, or features where the image tower is frozen, and ids; the last half of each row is padding."""
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (rows, DIM) if towers == "text" else (rows, 3, SIZE, SIZE)
        ids = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=generator)
        ids[:, LENGTH // 2 :] = 1
        yield torch.randn(shape, generator=generator).to(dtype), ids


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, arXiv:2303.15343."""
    logits = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T * scale.exp() + bias
    signs = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def ours(towers: str, rows: int, warmup: int, steps: int, bf16: bool) -> dict[str, Any]:
    """Time steps of clipgraft; `towers` is `text` or `both`."""
    import clipgraft as cg
    from clipgraft.engine.encoder import Encoder
    from clipgraft.models.clip import as_clip

    clip = as_clip(base())
    targets = "text-attention" if towers == "text" else "text-attention,vision.*.q,k,v,out"
    cg.apply_lora(clip, r=RANK, targets=targets)
    clip.train()
    encoder = Encoder(clip, autocast=bf16)
    if towers == "text":
        encoder.forget("vision")
    image = (lambda given: given) if towers == "text" else encoder.encode_image
    return _timed(clip.model, image, encoder.encode_text, batches(rows, towers, torch.float32), warmup, steps)


def peft(towers: str, rows: int, warmup: int, steps: int, bf16: str = "") -> dict[str, Any]:
    """Time steps of transformers and PEFT; `bf16` is `autocast`, `weights`, or nothing for fp32."""
    from peft import LoraConfig, get_peft_model

    dtype = torch.bfloat16 if bf16 == "weights" else torch.float32
    inside = "text_model" if towers == "text" else "(text_model|vision_model)"
    sites = rf"{inside}\.encoder\.layers\.\d+\.self_attn\.({'|'.join(_MODULES)})"
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sites)
    model = get_peft_model(base().to(dtype), config, autocast_adapter_dtype=False).train()
    inner: Any = model.get_base_model()

    def image(given: Tensor) -> Tensor:
        found: Tensor = given if towers == "text" else inner.get_image_features(given).pooler_output
        return found

    def text(ids: Tensor) -> Tensor:
        found: Tensor = inner.get_text_features(ids).pooler_output
        return found

    return _timed(model, image, text, batches(rows, towers, dtype), warmup, steps, bf16 == "autocast")


def _timed(
    model: Any,
    image: Callable[[Tensor], Tensor],
    text: Callable[[Tensor], Tensor],
    data: Iterator[Batch],
    warmup: int,
    steps: int,
    autocast: bool = False,
) -> dict[str, Any]:
    scale, bias = base().logit_scale, base().logit_bias

    def loss_of(batch: Batch) -> Tensor:
        return sigmoid_loss(image(batch[0]), text(batch[1]), scale, bias)

    return timed_steps(data, loss_of, adamw(model), warmup=warmup, steps=steps, autocast=autocast)
