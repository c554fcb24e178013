"""Join two towers of your own into one model, adapt it, measure it, and search with it.

    python examples/own_towers.py

The towers are tiny and random, so that nothing is downloaded. Put `AutoModel.from_pretrained(...)` and the
tokenizer and image processor of your models in their places. Results go to the folder `own`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel, ByT5Tokenizer, ViTConfig, ViTImageProcessor, ViTModel

import clipgraft as cg
from clipgraft.models import DualEncoder

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def own_model() -> DualEncoder:
    """Two towers that know nothing of each other, with a Linear from each to the features."""
    torch.manual_seed(0)
    return DualEncoder(
        ViTModel(ViTConfig(**TINY, image_size=64, patch_size=16)),
        BertModel(BertConfig(**TINY, vocab_size=384)),
        nn.Linear(64, 48, bias=False),
        nn.Linear(64, 48, bias=False),
        tokenizer=ByT5Tokenizer(),  # bytes, which need no vocabulary
        preprocess=ViTImageProcessor(size={"height": 64, "width": 64}),
    )


def main(out: Path = Path("own"), pictures: int = 64) -> None:
    table = cg.emoji.write_scenes(out / "data", "train", pictures, ["vi"])["vi"]
    pairs, model = cg.read_pairs(table), own_model()
    print("before:", cg.evaluate_retrieval(model, pairs))
    cg.apply_lora(model, r=8, targets="linear+embedding")
    train = cg.TrainArgs(batch_size=32, lr=1e-2, warmup=5, epochs=20)
    cg.fit(model, pairs, train=train, run=cg.RunArgs(out=out / "run", progress=False))
    print("after:", cg.evaluate_retrieval(model, pairs))
    cg.search.encode_folder(model, table, out / "encoded")
    hits = cg.search.query(out / "encoded", pairs.captions[0][0], k=3, model=model)
    print(pairs.captions[0][0], "->", ", ".join(Path(hit.path or "").name for hit in hits))


if __name__ == "__main__":
    main()
