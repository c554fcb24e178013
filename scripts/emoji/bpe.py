"""Learn a small byte-level BPE in CLIP's own format, for stock `transformers.CLIPTokenizer`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def learn_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer of at most `vocab_size` tokens learned on `texts`.

    The vocabulary is laid out like OpenAI's: 256 bytes, the 256 bytes that end a word, one token a merge,
    start and end of text. All bytes are in it, so any text survives (lower-cased and NFC, as CLIP has it).
    """
    stock = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(unk_token=None, continuing_subword_prefix="", end_of_word_suffix=SUFFIX))
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size - 258,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    single = [*alphabet, *(byte + SUFFIX for byte in alphabet)]
    merged = ["".join(pair) for pair in merges]
    tokens = dict.fromkeys([*single, *merged, START, END])
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context_length)
