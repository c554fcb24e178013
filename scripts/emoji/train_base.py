"""Train the embedded base model: a small CLIP, from scratch, on generated emoji scenes.

    python scripts/emoji/train_base.py            # writes src/clipgraft/assets/emoji/base

This keeps its own short loop on purpose: it trains every weight from nothing on scenes made in memory, which
the library's loop, made for adapters on a pretrained model, has no reason to do. Two stages: single objects
in quarter-size windows against their names, which is cheap and teaches what things look like; then whole
scenes against their captions. Both are mostly English with a small share of the other languages. A run that
was killed goes on from its last checkpoint under `--work` when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from base_data import LANGUAGES, PATCH, WINDOW, Shard, draw_windows, make_images, pick_language, to_pixels
from bpe import learn_tokenizer
from evaluate_base import recalls
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clipgraft.emoji.captions import name_group
from clipgraft.emoji.drawing import SIDE, Group
from clipgraft.emoji.scenes import EmojiScenes

CONTEXT = 48
BASE = Path(__file__).parents[2] / "src" / "clipgraft" / "assets" / "emoji" / "base"


def make_tokenizer(scenes: EmojiScenes, vocab_size: int, folder: Path, rank: int) -> CLIPTokenizer:
    """A tokenizer learned on all captions, in all languages, of the first scenes.

    Learning breaks ties otherwise each time: all processes, and a run that goes on, have the one in `folder`.
    """
    if rank == 0 and not (folder / "tokenizer.json").exists():
        some = range(min(len(scenes), 6000))
        texts = (caption for i in some for language in LANGUAGES for caption in scenes.captions(i, language))
        fresh = folder.with_suffix(".part")
        shutil.rmtree(fresh, ignore_errors=True)
        learn_tokenizer(texts, vocab_size, CONTEXT).save_pretrained(fresh)
        fresh.rename(folder)
    dist.barrier()
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def make_model(tokenizer: CLIPTokenizer, width: int) -> CLIPModel:
    """A CLIP with fresh weights: 6 vision layers on 12-pixel patches, 4 text layers."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 48}
    text = {
        **shape,
        "num_hidden_layers": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": width,
    }
    vision = {**shape, "num_hidden_layers": 6, "image_size": SIDE, "patch_size": PATCH}
    vision["projection_dim"] = width
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    # On a CPU the backward pass of scaled_dot_product_attention costs twice the plain matmuls at these sizes.
    return CLIPModel._from_config(config, attn_implementation="eager")


def features(
    model: CLIPModel, pixels: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of images and texts, float32 (B, width) each, not normalised."""
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    return image.float(), text.float()


def padded(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens in few lengths, each of which is compiled; what is added comes after the end of text."""
    more = -tokens["input_ids"].shape[1] % 16
    return {name: F.pad(rows, (0, more)) for name, rows in tokens.items()}


@cache
def compiled_features() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`features` by torch.compile: a third less time on a CPU."""
    compiled: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.compile(features)
    return compiled


def name_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, objects: list[int], step: int, seed: int
) -> torch.Tensor:
    """Embeddings of the objects' names, each in a language drawn by its share, float32 (objects, width)."""
    draw = np.random.default_rng([seed, step, 1]).random(len(objects))
    texts = [name_group(Group(i, 1), pick_language(which)) for i, which in zip(objects, draw, strict=True)]
    tokens = tokenizer(texts, padding="longest", truncation=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        text: torch.Tensor = model.get_text_features(**tokens).pooler_output
    return text.float()


def window_features(model: CLIPModel, pixels: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Embeddings of (B, 3, 48, 48) windows that lie `row` and `column` patches into an image, (B, width).

    A quarter of the patches costs a quarter of the time, and each keeps the position it has in a whole image.
    """
    vision = model.vision_model
    with torch.autocast("cpu", torch.bfloat16):
        patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        side, per_row = WINDOW // PATCH, SIDE // PATCH
        cells = [(row + y) * per_row + column + x for y in range(side) for x in range(side)]
        positions = vision.embeddings.position_embedding.weight
        start = (vision.embeddings.class_embedding + positions[0]).expand(len(pixels), 1, -1)
        tokens = torch.cat([start, patches + positions[1 + torch.tensor(cells)]], dim=1)
        hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
        image: torch.Tensor = model.visual_projection(vision.post_layernorm(hidden[:, 0]))
    return image.float()


def contrastive_loss(model: CLIPModel, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy over the batch of all processes (Radford et al. 2021).

    The temperature is multiplied in before rows are gathered, so that the gradient of this process is its
    part of the whole: `average_gradients` then gives that of one process with all rows.
    """
    images = gathered(model.logit_scale.exp() * F.normalize(image, dim=-1))
    logits = images @ gathered(F.normalize(text, dim=-1)).T
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss * (len(logits) // len(image))


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """(B, D) rows of every process one after another; only this process's own have a gradient."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach())
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def make_optimizer(model: CLIPModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place at once."""
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    part.replace(path)


def save_base(model: CLIPModel, tokenizer: CLIPTokenizer, work: Path, out: Path) -> None:
    """Write a complete Hugging Face folder under `work`, then move its files into `out` one by one."""
    fresh = work / "base"
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=half, image_std=half
    ).save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        replace_file(out / path.name, partial(shutil.copyfile, path))


def object_step(model: CLIPModel, tokenizer: CLIPTokenizer, batch: int, step: int, seed: int) -> torch.Tensor:
    """The loss of one step of the first stage: single objects against the names of all in the batch."""
    windows, labels = draw_windows(batch, step, seed)
    row, column = np.random.default_rng([seed, step, 2]).integers(0, (SIDE - WINDOW) // PATCH + 1, 2)
    image = window_features(model, to_pixels(windows), int(row), int(column))
    objects, target = torch.unique(labels, return_inverse=True)
    names = name_features(model, tokenizer, objects.tolist(), step, seed)
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(names, dim=-1).T
    return F.cross_entropy(logits, target)


def average_gradients(model: CLIPModel, processes: int) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= processes
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))


def update(model: CLIPModel, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One clipped optimizer step at rate `lr`."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))


def report(
    model: CLIPModel, tokenizer: CLIPTokenizer, step: int, seconds: float, args: argparse.Namespace
) -> None:
    """Save the base folder; print and save recalls, of all test scenes and languages at the end only."""
    save_base(model, tokenizer, args.work, args.out)
    last = step == args.steps
    # The test scenes are looked at once: what is chosen on the way is chosen on others.
    scenes = EmojiScenes("test", args.test_scenes) if last else EmojiScenes("val", args.test_scenes // 5)
    languages = LANGUAGES if last else ("en", "vi")
    result = {language: recalls(model, tokenizer, scenes, language) for language in languages}
    for language, found in result.items():
        print(language, " ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    summary = {"step": step, "seconds": round(seconds), "scenes": len(scenes), scenes.split: result}
    (args.work / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def join(rank: int, args: argparse.Namespace) -> None:
    """Make this process one of `args.processes` that average gradients; one thread and one core each."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity") and args.processes <= (os.cpu_count() or 1):
        # Processes that wait for each other tend to be put on one core by the scheduler, and then take turns.
        os.sched_setaffinity(0, {rank})
    meeting = f"file://{args.work.resolve()}/rendezvous"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)


def step_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, shard: Shard, step: int, args: argparse.Namespace
) -> torch.Tensor:
    """The loss of one step of this process, in whichever stage the step falls."""
    seed = args.seed * args.processes + shard.rank
    if step < args.object_steps:
        return object_step(model, tokenizer, args.object_batch_size, step, seed)
    pixels, texts = shard.batch(step - args.object_steps, args.batch_size, seed)
    tokens = padded(dict(tokenizer(texts, padding="longest", truncation=True, return_tensors="pt")))
    encode = compiled_features() if args.compile else features
    return contrastive_loss(model, *encode(model, pixels, tokens))


_NO_MATTER = ("out", "work", "save_every", "test_scenes", "rank")


def recipe(args: argparse.Namespace) -> dict[str, object]:
    """The arguments that a run must go on with."""
    return {name: value for name, value in vars(args).items() if name not in _NO_MATTER}


def read_checkpoint(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The state of an earlier start of this run, None if there is none; exits if it was another run."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    wanted, found = recipe(args), state["recipe"]
    if other := [f"--{n.replace('_', '-')} was {found.get(n)}" for n in wanted if wanted[n] != found.get(n)]:
        raise SystemExit(f"{path} is of another run: {', '.join(other)}; give that, or another --work")
    return state


def train(rank: int, args: argparse.Namespace) -> None:
    """One process of the training: make its scenes, step with the others; rank 0 saves and reports."""
    join(rank, args)
    scenes = EmojiScenes("train", args.scenes, args.seed)
    tokenizer = make_tokenizer(scenes, args.vocab_size, args.work / "tokenizer", rank)
    model = make_model(tokenizer, args.width)
    optimizer = make_optimizer(model, args.weight_decay)
    checkpoint = args.work / "checkpoint.pt"
    first, spent, losses = 0, 0.0, []
    if (state := read_checkpoint(checkpoint, args)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    start = saved = time.monotonic()
    shard = Shard(scenes, make_images(scenes, rank, args.processes), rank, args.processes)
    model.train()
    for step in range(first, args.steps):
        loss = step_loss(model, tokenizer, shard, step, args)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, args.processes)
        update(model, optimizer, learning_rate(step, args.steps, args.warmup, args.lr))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {step}; lower --lr")
        done, seconds = step + 1, spent + time.monotonic() - start
        if rank == 0 and done % 50 == 0:
            mean, scale = sum(losses[-50:]) / len(losses[-50:]), model.logit_scale.exp().item()
            print(f"step {done}/{args.steps} loss {mean:.3f} scale {scale:.1f} {seconds:.0f} s", flush=True)
        if rank == 0 and (time.monotonic() - saved > args.save_every or done == args.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": done, "seconds": seconds, "recipe": recipe(args)}
            replace_file(checkpoint, partial(torch.save, state))
            report(model, tokenizer, done, seconds, args)
            saved = time.monotonic()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--work", type=Path, default=Path("logs/emoji-base"))
    parser.add_argument("--scenes", type=int, default=80_000)
    parser.add_argument("--steps", type=int, default=2_800, help="of both stages together")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocab-size", type=int, default=5_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--object-steps", type=int, default=1_200, help="first steps, on single objects")
    parser.add_argument("--object-batch-size", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=480, help="seconds between checkpoints")
    parser.add_argument("--test-scenes", type=int, default=1_000, help="measured on at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one thread each; batch sizes are for each")
    parser.add_argument("--rank", type=int, help="set by the first process when it starts the others")
    args = parser.parse_args()
    if args.rank is not None:
        train(args.rank, args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, *sys.argv, "--rank"]
    others = [subprocess.Popen([*command, str(rank)]) for rank in range(1, args.processes)]
    train(0, args)
    for other in others:
        other.wait()


if __name__ == "__main__":
    main()
