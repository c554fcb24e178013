"""Cut vocabularies, judged by the tokenizers library itself and by BPE written down naively."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models
from transformers import CLIPTokenizer

import clipgraft as cg
from clipgraft.compact.model import compact_model
from clipgraft.compact.vocabulary import (
    END,
    Bpe,
    bpe_of,
    count_tokens,
    cut_tokenizer,
    kept_merges,
    most_used,
    needed_tokens,
    unchanged_tokens,
)
from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.models.load import load

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORDS = st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=6)


@st.composite
def merge_lists(draw: st.DrawFn) -> Bpe:
    """Merges over three letters in any order, tokens that two merges make included."""
    tokens = [*"abc", *(f"{letter}{END}" for letter in "abc")]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 14))):
        first = draw(st.sampled_from([token for token in tokens if not token.endswith(END)]))
        second = draw(st.sampled_from(tokens))
        if (first, second) not in merges and len(first + second) < 14:
            merges.append((first, second))
            tokens += [first + second] * (first + second not in tokens)
    ordered = draw(st.permutations(merges))
    ids = {token: number for number, token in enumerate([*tokens, *SPECIAL])}
    return Bpe(ids, ordered, frozenset(SPECIAL))


def split(bpe: Bpe, words: list[str]) -> list[list[str]]:
    """Tokens of each word as the tokenizers library makes them."""
    model = models.BPE(vocab=dict(bpe.ids), merges=list(bpe.merges), end_of_word_suffix=END)
    return [[token.value for token in model.tokenize(word)] for word in words]


def naive(merges: list[tuple[str, str]], word: str) -> list[str]:
    """BPE by the book: the leftmost pair of the lowest rank is merged, until no pair can be."""
    parts = [*word[:-1], word[-1] + END]
    rank = {merge: number for number, merge in enumerate(merges)}
    while True:
        pairs = [(rank[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in rank]
        if not pairs:
            return parts
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def cut(bpe: Bpe, kept: frozenset[str]) -> Bpe:
    """What is left of a vocabulary."""
    tokens = sorted(kept, key=bpe.ids.__getitem__)
    ids = {token: number for number, token in enumerate(tokens)}
    return Bpe(ids, kept_merges(bpe, kept), bpe.special)


@given(merge_lists(), WORDS, WORDS)
def test_words_of_the_corpus_keep_their_tokens(bpe: Bpe, corpus: list[str], others: list[str]) -> None:
    """A caption that the vocabulary was cut for is encoded otherwise, or another one not at all."""
    before = split(bpe, corpus)
    small = cut(bpe, needed_tokens(bpe, Counter(token for word in before for token in word)))
    assert split(small, corpus) == before
    for word, tokens in zip(others, split(small, others), strict=True):
        assert "".join(tokens) == word + END
        assert tokens == naive(list(small.merges), word) or len(bpe.makers) < len(bpe.merges)


@given(merge_lists(), WORDS, st.integers(0, 14))
def test_words_that_are_called_unchanged_are(bpe: Bpe, corpus: list[str], more: int) -> None:
    """The count of texts that a lossy cut leaves alone is too high."""
    before = split(bpe, corpus)
    counts = Counter(token for word in before for token in word)
    size = min(len(bpe.alphabet) + len(SPECIAL) + more, len(bpe.ids))
    kept = most_used(bpe, counts, size)
    assert len(kept) == size
    unchanged = unchanged_tokens(bpe, kept)
    for old, new in zip(before, split(cut(bpe, kept), corpus), strict=True):
        if unchanged.issuperset(old):
            assert new == old


def test_the_most_used_stay() -> None:
    """`vocab_size` keeps rare tokens and drops frequent ones, or keeps tokens without their parts."""
    merges = [("a", "b"), ("b", f"c{END}"), ("ab", f"c{END}"), ("a", f"b{END}")]
    tokens = [*"abc", *(f"{letter}{END}" for letter in "abc"), *(first + second for first, second in merges)]
    bpe = Bpe({token: i for i, token in enumerate([*tokens, *SPECIAL])}, merges, frozenset(SPECIAL))
    counts = {f"abc{END}": 2, f"ab{END}": 5, f"bc{END}": 1}
    always = bpe.alphabet | bpe.special
    assert most_used(bpe, counts, 9) == always | {f"ab{END}"}
    assert most_used(bpe, counts, 11) == always | {f"ab{END}", "ab", f"abc{END}"}
    assert most_used(bpe, {}, 10) == always | {"ab", f"bc{END}"}
    with pytest.raises(
        ConfigError, match=r"`vocab_size=7`: 6 byte symbols and 2 special tokens .* ask for 8"
    ):
        most_used(bpe, counts, 7)
    with pytest.raises(ConfigError, match="the base has 12 tokens"):
        most_used(bpe, counts, 13)


@pytest.fixture(scope="module")
def emoji() -> Clip:
    """The embedded default, whose tokenizer has merges of eight languages."""
    return load("emoji")


@pytest.fixture(scope="module")
def tokenizer(emoji: Clip) -> CLIPTokenizer:
    """Its tokenizer."""
    return emoji.tokenizer.inner


PIECES = [
    "a",
    "red",
    "fox's",
    "two",
    "bàn",
    "đèn",
    "chó",
    "mèo",
    "Katze",
    "12",
    "🦊",
    "<|endoftext|>",
    "<|startoftext|>",
    "!",
    "…",
]
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.lists(st.sampled_from(PIECES)).map(" ".join),
        st.text("aăâeioôơuưndghtrxñü ", max_size=30),
    ),
    min_size=1,
    max_size=5,
)


@given(texts=TEXTS, others=TEXTS)
def test_any_text_in_any_script(tokenizer: CLIPTokenizer, texts: list[str], others: list[str]) -> None:
    """A real tokenizer, cut for some texts, gives these other tokens than before, or cannot read others."""
    bpe = bpe_of(tokenizer)
    kept = needed_tokens(bpe, count_tokens(tokenizer, texts))
    tokens = sorted(kept, key=bpe.ids.__getitem__)
    small = cut_tokenizer(tokenizer, tokens, kept_merges(bpe, kept))
    old = [bpe.ids[token] for token in tokens]
    assert [[old[i] for i in ids] for ids in small(texts)["input_ids"]] == tokenizer(texts)["input_ids"]
    assert [small.decode(ids) for ids in small(others)["input_ids"]] == [
        tokenizer.decode(ids) for ids in tokenizer(others)["input_ids"]
    ]


def test_eight_languages(emoji: Clip) -> None:
    """A vocabulary cut for real captions loses one of them."""
    scenes = cg.emoji.EmojiScenes("test", 60)
    texts = [
        text for i in range(60) for language in ("en", "vi", "de") for text in scenes.captions(i, language)
    ]
    small = compact_model(emoji, texts=texts)
    assert small.vocabulary is not None
    assert len(small.vocabulary.token_ids) < 2000 < small.vocabulary.before
    old = small.vocabulary.token_ids
    ids = small.clip.tokenize(texts)
    assert [[old[i] for i in row] for row in ids.tolist()] == emoji.tokenize(texts).tolist()
