"""Byte-pair encoding with fewer tokens, in which the texts of a corpus keep theirs.

BPE applies, again and again, the merge of lowest rank that a word allows. Take the merges M, the merges P
that were applied in a word, and any S between: P ⊆ S ⊆ M. With S instead of M every step has fewer merges to
choose from, but the one chosen before is still there and still the lowest; and where M allowed none at the
end, S allows none. So the word is split alike, whatever other merges are gone. What must stay for a corpus
are the merges that make its tokens, and those that make the parts of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from clipgraft.errors import ConfigError

END = "</w>"
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
