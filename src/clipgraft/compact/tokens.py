"""transformers' CLIP tokenizers, taken apart and put together again with fewer tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from clipgraft.compact.bpe import END, Bpe, Merge, unchanged_tokens
from clipgraft.errors import ModelError
from clipgraft.files import write_text

_BATCH = 4096
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
_PLAIN = {"type": "BPE", "end_of_word_suffix": END}
_MUST_BE_EMPTY = ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges", "fuse_unk")


def bpe_of(inner: Any) -> Bpe:
    """A tokenizer's tokens and merges.

    Raises:
        ModelError: it is not CLIP's byte-level BPE.
    """
    name = type(inner).__name__
    if "CLIPTokenizer" not in name or not hasattr(inner, "backend_tokenizer"):
        raise ModelError(
            f"its tokenizer is a {name}, not CLIP's byte-level BPE, so its vocabulary cannot be cut: "
            "leave out `texts` and `vocab_size` and cut blocks alone"
        )
    model = json.loads(inner.backend_tokenizer.to_str())["model"]
    odd = [key for key, value in _PLAIN.items() if model.get(key) != value]
    odd += [key for key in _MUST_BE_EMPTY if model.get(key)]
    if odd:
        raise ModelError(
            f"its tokenizer has {odd[0]} = {model.get(odd[0])!r}, which CLIP's does not: its vocabulary "
            "cannot be cut; cut blocks alone"
        )
    special = {str(getattr(inner, role)) for role in _ROLES} | set(inner.get_added_vocab())
    merges = [(first, second) for first, second in map(_pair, model["merges"])]
    return Bpe(dict(inner.get_vocab()), merges, frozenset(special))


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def count_tokens(inner: Any, texts: Sequence[str]) -> Counter[str]:
    """How often each token occurs in texts, start and end left out, nothing truncated."""
    counts: Counter[str] = Counter()
    for tokens in _encoded(inner, texts):
        counts.update(tokens)
    return counts


def count_unchanged(inner: Any, texts: Sequence[str], bpe: Bpe, kept: Collection[str]) -> int:
    """How many of the texts are split as before if no tokens but those in `kept` are left."""
    unchanged = unchanged_tokens(bpe, kept)
    return sum(unchanged.issuperset(tokens) for tokens in _encoded(inner, texts))


def _encoded(inner: Any, texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        for encoding in inner(batch, add_special_tokens=False, verbose=False).encodings:
            yield encoding.tokens


def cut_tokenizer(inner: Any, tokens: Sequence[str], merges: Sequence[Merge]) -> Any:
    """A `CLIPTokenizer` with these tokens, numbered in this order; all else as `inner` has it."""
    from transformers import CLIPTokenizer

    added = {token.content: token for token in inner.added_tokens_decoder.values()}
    roles = {role: added.get(name, name) for role in _ROLES if (name := str(getattr(inner, role)))}
    ids = {token: number for number, token in enumerate(tokens)}
    made = CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=inner.model_max_length, **roles)
    made.add_tokens([token for name, token in added.items() if name not in map(str, roles.values())])
    return made


def write_vocabulary(inner: Any, folder: Path) -> None:
    """`vocab.json` and `merges.txt`, which tokenizers without tokenizers.json read."""
    bpe = bpe_of(inner)
    write_text(folder / "vocab.json", json.dumps(dict(sorted(bpe.ids.items(), key=lambda item: item[1]))))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in bpe.merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
