"""Training steps: timed one by one, on batches that lie in the device's memory already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants.loop import adamw
from benchmarks.data import read_table
from benchmarks.gpu.bench import Bench, Values, compiled, our_clip, peft_model, repeated
from benchmarks.prepare import LORA, OPENCLIP_BASE


def timed_steps(
    bench: Bench,
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: bool,
    warmup: int,
    steps: int,
) -> Values:
    """Time each step after a warm-up, waiting for data included."""
    losses, marks = [], []
    waiting = iter(batches)
    bench.reset_peak()
    for step in range(warmup + steps):
        if step >= warmup:
            marks.append(bench.now())
        batch = next(waiting)
        with torch.autocast(bench.device, torch.bfloat16, enabled=autocast):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    marks.append(bench.now())
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    return {
        "step_seconds": seconds,
        "losses": [float(loss) for loss in losses[: bench.steps]],
        **bench.peak(),
    }


def ours(bench: Bench, targets: str, batch: int, autocast: bool, compile_it: bool = False) -> Values:
    """Run the engine's own step, with packing of the captions; a frozen image tower is cached."""
    import clipgraft as cg
    from clipgraft.engine.encoder import Encoder

    clip = our_clip(bench)
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=0.1, targets=targets)
    clip.train()
    encoder = Encoder(clip, autocast=autocast)
    ids, pixels = tokens_and_pixels(bench, batch)
    pixels = pixels.to(bench.device)
    with torch.no_grad():
        known = encoder.encode_image(pixels) if targets.startswith("text") else None
    encode_text: Callable[[Tensor], Tensor] = encoder.encode_text
    encode_image: Callable[[Tensor], Tensor] = encoder.encode_image
    if compile_it:
        (encode_text(ids).sum() + encode_image(pixels).sum()).backward()  # type: ignore[no-untyped-call]  # prepares the weights
        clip.model.zero_grad()
        encode_text, encode_image = compiled(encoder)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        images = encode_image(batch[1]) if known is None else known
        return contrast(images, encode_text(batch[0]), clip.logit_scale)

    # The engine chooses its types by itself; torch's autocast is for models that do not.
    optimizer = adamw(clip.model, fused=True)
    return timed_steps(
        bench, repeated((ids, pixels)), loss_of, optimizer, False, bench.warmup, 2 * bench.steps
    )


def peft(
    bench: Bench,
    targets: str,
    batch: int,
    autocast: bool,
    bf16: bool = False,
    known: bool = False,
    compile_it: bool = False,
) -> Values:
    """Run the same with PEFT, padded to the longest; `known` gives it cached image features."""
    model = peft_model(bench, targets, bf16)
    ids, pixels = tokens_and_pixels(bench, batch)
    longest = int((ids != 0).sum(1).max())
    ids, mask = ids[:, :longest].to(bench.device), (ids[:, :longest] != 0).long().to(bench.device)
    pixels = pixels.to(bench.device, torch.bfloat16 if bf16 else torch.float32)
    clip = model.base_model.model
    frozen = None
    if known:
        with torch.no_grad():
            frozen = clip.get_image_features(pixel_values=pixels).pooler_output.float()
    forward = torch.compile(model) if compile_it else model

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        if frozen is None:
            out = forward(input_ids=batch[0], attention_mask=mask, pixel_values=batch[1], return_loss=True)
            loss: Tensor = out.loss
            return loss
        texts = clip.get_text_features(input_ids=batch[0], attention_mask=mask).pooler_output
        return contrast(frozen, texts.float(), clip.logit_scale)

    optimizer = adamw(model, fused=True)
    return timed_steps(
        bench, repeated((ids, pixels)), loss_of, optimizer, autocast, bench.warmup, 2 * bench.steps
    )


def openclip(bench: Bench, targets: str, batch: int, compile_it: bool = False) -> Values:
    """Run open_clip's own training in bf16 autocast: all weights of the same towers, having no LoRA."""
    import open_clip

    model = open_clip.create_model("ViT-B-32", pretrained=str(OPENCLIP_BASE), device=bench.device)
    model.train()
    if targets.startswith("text"):
        model.lock_image_tower()
    ids, pixels = tokens_and_pixels(bench, batch)
    ids, pixels = ids.to(bench.device), pixels.to(bench.device)
    forward = torch.compile(model) if compile_it else model

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, texts, logit_scale = forward(batch[1], batch[0])
        return contrast(images.float(), texts.float(), logit_scale.log())

    optimizer = adamw(model, fused=True)
    return timed_steps(
        bench, repeated((ids, pixels)), loss_of, optimizer, True, bench.warmup, 2 * bench.steps
    )


def tokens_and_pixels(bench: Bench, batch: int) -> tuple[Tensor, Tensor]:
    """Make (batch, 77) ids of the table's first captions, zero after the end, and noise as pixels."""
    import open_clip

    captions = [caption for _, caption in read_table(bench.table)[:batch]]
    torch.manual_seed(0)
    return open_clip.get_tokenizer("ViT-B-32")(captions), torch.randn(len(captions), 3, 224, 224)


def contrast(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
