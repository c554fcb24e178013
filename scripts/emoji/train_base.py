"""Train the embedded base model: a small CLIP, from scratch, on generated emoji scenes.

    python scripts/emoji/train_base.py            # writes src/clipgraft/assets/emoji/base

This keeps its own short loop on purpose: it trains every weight from nothing on scenes made in memory, which the
library's loop, made for adapters on a pretrained model, has no reason to do. The captions are mostly English with a
small share of the other languages. A run that was killed goes on from its last checkpoint under `--work` when it is
started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

# Threads that spin at barriers lose most of their time where other programs run; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from bpe import learn_tokenizer
from evaluate_base import recalls
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clipgraft.data.emoji import LANGUAGES, EmojiScenes
from clipgraft.data.emoji_art import load_art
from clipgraft.data.emoji_scene import SIDE

CONTEXT = 48
ENGLISH_SHARE, VIETNAMESE_SHARE = 0.84, 0.06
BASE = Path(__file__).parents[2] / "src" / "clipgraft" / "assets" / "emoji" / "base"


def make_images(scenes: EmojiScenes) -> np.ndarray:
    """All scenes as uint8, (N, 96, 96, 3)."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.uint8)
    for i in range(len(scenes)):
        images[i] = np.asarray(scenes.image(i))
    return images


def make_tokenizer(scenes: EmojiScenes, vocab_size: int) -> CLIPTokenizer:
    """A tokenizer learned on all captions, in all languages, of the first scenes."""
    texts = (c for i in range(min(len(scenes), 6000)) for lang in LANGUAGES for c in scenes.captions(i, lang))
    return learn_tokenizer(texts, vocab_size, CONTEXT)


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
    vision = {**shape, "num_hidden_layers": 6, "image_size": SIDE, "patch_size": 12, "projection_dim": width}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    # On a CPU the backward pass of scaled_dot_product_attention costs twice the plain matmuls at these sizes.
    return CLIPModel._from_config(config, attn_implementation="eager")


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, 96, 96, 3) to normalised float32 (B, 3, 96, 96), as the saved image processor does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def pick_captions(scenes: EmojiScenes, indices: list[int], step: int, seed: int) -> list[str]:
    """One caption a scene in a language drawn by its share; the same for the same seed and step."""
    draw = np.random.default_rng([seed, step]).random((len(indices), 2))
    others = [language for language in LANGUAGES if language not in ("en", "vi")]
    texts = []
    for index, (which, sentence) in zip(indices, draw, strict=True):
        if which < ENGLISH_SHARE:
            language = "en"
        elif which < ENGLISH_SHARE + VIETNAMESE_SHARE:
            language = "vi"
        else:
            rest = (which - ENGLISH_SHARE - VIETNAMESE_SHARE) / (1 - ENGLISH_SHARE - VIETNAMESE_SHARE)
            language = others[min(int(rest * len(others)), len(others) - 1)]
        texts.append(scenes.captions(index, language)[int(sentence * 5)])
    return texts


def batch_indices(step: int, batch: int, size: int, seed: int) -> list[int]:
    """The scenes of one step: every epoch a new order of all."""
    per_epoch = size // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 1_000_000 + epoch]).permutation(size)
    return [int(i) for i in order[place * batch : (place + 1) * batch]]


def features(
    model: CLIPModel, pixels: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of images and texts, float32 (B, width) each, not normalised."""
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    return image.float(), text.float()


def object_loss(head: torch.nn.Linear, image: torch.Tensor, text: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """How badly one linear head, shared by both towers, tells which objects a scene holds.

    `present` is (B, objects), each row a distribution over the objects of the scene. The head is thrown away after
    training; without it the small model spends most of its steps before it tells one object from another.
    """
    return (F.cross_entropy(head(image), present) + F.cross_entropy(head(text), present)) / 2


def contrastive_loss(model: CLIPModel, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy over the batch (Radford et al. 2021)."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def present_objects(scenes: EmojiScenes, indices: list[int]) -> torch.Tensor:
    """(B, objects): a uniform distribution over the objects of each scene."""
    present = torch.zeros(len(indices), len(load_art().objects))
    for row, index in enumerate(indices):
        groups = scenes.scene(index).groups
        present[row, [group.index for group in groups]] = 1 / len(groups)
    return present


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
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


def replace_file(path: Path, write) -> None:  # type: ignore[no-untyped-def]
    """Let `write` fill a file beside `path`, then put it in place at once."""
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    os.replace(part, path)


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
        replace_file(out / path.name, lambda part, path=path: part.write_bytes(path.read_bytes()))


def train(args: argparse.Namespace) -> None:
    """Make the data, train, save a checkpoint now and then, write the base folder and its metrics."""
    torch.manual_seed(args.seed)
    scenes = EmojiScenes("train", args.scenes, args.seed)
    tokenizer = make_tokenizer(scenes, args.vocab_size)
    model = make_model(tokenizer, args.width)
    head = torch.nn.Linear(args.width, len(load_art().objects))
    optimizer = make_optimizer(torch.nn.ModuleList([model, head]), args.weight_decay)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    images = make_images(scenes)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        print(f"going on from step {first}", flush=True)
    model.train()
    start = saved = time.monotonic()
    losses: list[float] = []
    for step in range(first, args.steps):
        indices = batch_indices(step, args.batch_size, args.scenes, args.seed)
        texts = pick_captions(scenes, indices, step, args.seed)
        tokens = dict(tokenizer(texts, padding="longest", truncation=True, return_tensors="pt"))
        image, text = features(model, to_pixels(images[indices]), tokens)
        loss = contrastive_loss(model, image, text)
        aux = object_loss(head, image, text, present_objects(scenes, indices))
        (loss + args.object_weight * (1 - step / args.steps) * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.warmup, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {step}; lower --lr")
        seconds = spent + time.monotonic() - start
        if (step + 1) % 25 == 0:
            mean = sum(losses[-25:]) / len(losses[-25:])
            scale = model.logit_scale.exp().item()
            print(f"step {step + 1}/{args.steps} loss {mean:.3f} objects {aux.item():.3f} scale {scale:.1f} {seconds:.0f} s", flush=True)
        if time.monotonic() - saved > args.save_every or step + 1 == args.steps:
            state = {"model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": seconds}
            replace_file(checkpoint, lambda part, state=state: torch.save(state, part))
            save_base(model, tokenizer, args.work, args.out)
            languages = LANGUAGES if step + 1 == args.steps else ("en", "vi")
            result = {lang: recalls(model, tokenizer, EmojiScenes("test", 1000), lang) for lang in languages}
            for language, found in result.items():
                print(language, " ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
            summary = {"step": step + 1, "seconds": round(seconds), "test": result}
            (args.work / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            saved = time.monotonic()


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--work", type=Path, default=Path("logs/emoji-base"))
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocab-size", type=int, default=5_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--object-weight", type=float, default=1.0, help="of the auxiliary loss; falls to 0")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--save-every", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
