"""Join two towers of your own into one model, adapt it, measure it, and search with it.

    python examples/own_towers.py --out own

The towers here are tiny and random, built from configurations, so that nothing is downloaded. Put
`AutoModel.from_pretrained(...)` and the tokenizer and image processor of your models in their places.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import clipgraft as cg
from clipgraft.models import DualEncoder

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_of(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of some captions, which pads with id 1 as XLM-R does."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=["<s>", "<pad>", "<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def own_model(captions: Sequence[str]) -> DualEncoder:
    """Two towers that know nothing of each other, with a Linear from each to the features."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(captions)
    return DualEncoder(
        ViTModel(ViTConfig(**TINY, image_size=64, patch_size=16)),
        XLMRobertaModel(XLMRobertaConfig(**TINY, vocab_size=len(tokenizer), max_position_embeddings=80)),
        nn.Linear(64, 48, bias=False),
        nn.Linear(64, 48, bias=False),
        tokenizer=tokenizer,
        preprocess=ViTImageProcessor(size={"height": 64, "width": 64}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Two towers of your own.")
    parser.add_argument("--out", type=Path, default=Path("own"), help="output folder")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    flags = parser.parse_args(argv)
    table = cg.emoji.write_scenes(flags.out / "data", "train", flags.pictures, ["vi"])["vi"]
    pairs = cg.read_pairs(table)
    captions = [caption for several in pairs.captions for caption in several]

    model = own_model(captions)
    cg.apply_lora(model, r=8, targets="linear+embedding")
    train = cg.TrainArgs(batch_size=32, lr=1e-2, warmup=5, epochs=flags.epochs)
    run = cg.fit(model, pairs, train=train, run=cg.RunArgs(out=flags.out / "run", progress=False))
    print("after training:", cg.evaluate_retrieval(model, pairs))

    again = own_model(captions)  # the same weights as before training
    print("before:", cg.evaluate_retrieval(again, pairs))
    cg.load_adapter(again, run.saved)
    cg.merge_lora(again)
    cg.remove_lora(again, keep_merged=True)  # a plain model of yours, which needs clipgraft no more
    cg.search.encode_folder(again, table, flags.out / "encoded")
    hits = cg.search.query(flags.out / "encoded", captions[0], k=3, model=again)
    print(captions[0], "->", ", ".join(Path(hit.path or "").name for hit in hits))


if __name__ == "__main__":
    main()
