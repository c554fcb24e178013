"""Recall of a CLIP on emoji scenes, through stock transformers only.

python scripts/emoji/evaluate_base.py         # all languages, 1,000 test scenes, prints a table
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from clipgraft.emoji.scenes import LANGUAGES, EmojiScenes

BASE = Path(__file__).parents[2] / "src" / "clipgraft" / "assets" / "emoji" / "base"


@torch.no_grad()
def recalls(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: EmojiScenes, language: str
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, in 0..1, with five captions an image.

    Image to text counts an image as found when any of its captions is among the first k.
    """
    was_training = model.training
    model.eval()
    image, text = [], []
    for start in range(0, len(scenes), 100):
        indices = range(start, min(start + 100, len(scenes)))
        pixels = np.stack([np.asarray(scenes.image(i)) for i in indices])
        pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        captions = [caption for i in indices for caption in scenes.captions(i, language)]
        tokens = tokenizer(captions, padding="longest", truncation=True, return_tensors="pt")
        image.append(model.get_image_features(pixel_values=pixel_values).pooler_output)
        text.append(model.get_text_features(**tokens).pooler_output)
    model.train(was_training)
    scores = F.normalize(torch.cat(image), dim=-1) @ F.normalize(torch.cat(text), dim=-1).T
    owner = torch.arange(scores.shape[1]) // 5
    own = scores[owner, torch.arange(scores.shape[1])]
    text_rank = (scores > own).sum(dim=0)
    best = own.view(-1, 5).amax(dim=1, keepdim=True)
    image_rank = (scores > best).sum(dim=1)
    result = {f"image_to_text_R@{k}": (image_rank < k).float().mean().item() for k in (1, 5, 10)}
    return result | {f"text_to_image_R@{k}": (text_rank < k).float().mean().item() for k in (1, 5, 10)}


def main() -> None:
    """Print recalls of a saved model, one line a language."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--scenes", type=int, default=1_000)
    args = parser.parse_args()
    model, tokenizer = CLIPModel.from_pretrained(args.model), CLIPTokenizer.from_pretrained(args.model)
    for language in LANGUAGES:
        found = recalls(model, tokenizer, EmojiScenes("test", args.scenes), language)
        print(language, " ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
