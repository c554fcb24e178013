"""Byte-pair encoding with fewer tokens, in which the texts of a corpus keep theirs.

BPE applies, again and again, the merge of lowest rank that a word allows. Take the merges M, the merges P
that were applied in a word, and any S between: P ⊆ S ⊆ M. With S instead of M every step has fewer merges to
choose from, but the one chosen before is still there and still the lowest; and where M allowed none at the
end, S allows none. So the word is split alike, whatever other merges are gone. What must stay for a corpus
are the merges that make its tokens, and those that make the parts of these.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipgraft.errors import ConfigError, ModelError
from clipgraft.files import write_text

END = "</w>"
_BATCH = 4096
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
_PLAIN = {"type": "BPE", "end_of_word_suffix": END}
_MUST_BE_EMPTY = ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges", "fuse_unk")
Merge = tuple[str, str]


@dataclass(frozen=True)
class Bpe:
    """CLIP's kind of tokenizer as plain data.

    Attributes:
        ids: every token with its id.
        merges: pairs of tokens, in order of rank; a pair makes the token of both joined.
        special: tokens that no merge makes and that stay in any case.
    """

    ids: Mapping[str, int]
    merges: Sequence[Merge]
    special: frozenset[str]

    @cached_property
    def makers(self) -> dict[str, list[Merge]]:
        """Every token that merges make, in order of rank, with all merges that make it."""
        found: dict[str, list[Merge]] = {}
        for first, second in self.merges:
            found.setdefault(first + second, []).append((first, second))
        return found

    @cached_property
    def alphabet(self) -> frozenset[str]:
        """The symbols that words begin as: each byte as one character, with and without the end of a word."""
        single = {token for token in self.ids if len(token.removesuffix(END)) == 1}
        return frozenset(single - self.special)


def usage(bpe: Bpe, counts: Mapping[str, int]) -> Counter[str]:
    """How often each token was made on the way to a corpus with `counts` of tokens; parts count, too.

    No token is used less than one that it is a part of.
    """
    total = Counter(counts)
    for token in sorted(bpe.makers, key=len, reverse=True):
        if times := total[token]:
            for merge in bpe.makers[token]:
                for part in merge:
                    total[part] += times
    return total


def needed_tokens(bpe: Bpe, counts: Mapping[str, int]) -> frozenset[str]:
    """What a corpus with these counts needs to be split as before, and any other text at all."""
    return bpe.alphabet | bpe.special | (usage(bpe, counts).keys() & bpe.ids.keys())


def most_used(bpe: Bpe, counts: Mapping[str, int], size: int) -> frozenset[str]:
    """`size` tokens: alphabet, special ones, and the most used; of those used alike, the first merges.

    Without counts these are the base's first merges, which its own training corpus had most often.

    Raises:
        ConfigError: `size` is too small for the alphabet, or larger than what there is.
    """
    always = bpe.alphabet | bpe.special
    if size < len(always):
        raise ConfigError(
            f"`vocab_size={size}`: {len(bpe.alphabet)} byte symbols and {len(bpe.special)} special tokens "
            f"stay in any case; ask for {len(always)} or more"
        )
    made = [token for token in bpe.makers if token not in always]
    if size > len(always) + len(made):
        raise ConfigError(
            f"`vocab_size={size}`: the base has {len(always) + len(made)} tokens that texts can be made of; "
            "ask for fewer"
        )
    total = usage(bpe, counts)
    made.sort(key=lambda token: -total[token])  # stable: the order of rank stays among equals
    return always | frozenset(made[: size - len(always)])


def kept_merges(bpe: Bpe, kept: Collection[str]) -> list[Merge]:
    """The merges of tokens in `kept` that make one in `kept`, in their order."""
    return [(a, b) for a, b in bpe.merges if a in kept and b in kept and a + b in kept]


def unchanged_tokens(bpe: Bpe, kept: Collection[str]) -> frozenset[str]:
    """The tokens in `kept` that can still be made in every way they could be."""
    unchanged = set((bpe.alphabet | bpe.special) & set(kept))
    for token in sorted(bpe.makers, key=len):
        parts = {part for merge in bpe.makers[token] for part in merge}
        if token in kept and parts <= unchanged:
            unchanged.add(token)
    return frozenset(unchanged)


# From here on: transformers' CLIP tokenizers, taken apart and put together again.


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
