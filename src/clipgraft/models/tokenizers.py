"""Tokenizers of both families behind one small interface: fixed-length ids, and lengths before truncation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokenizers of transformers keep padding and truncation on themselves: two threads take each other's.
_SETTINGS = threading.Lock()


@dataclass(frozen=True)
class OpenClipTokenizer:
    """open_clip's tokenizer object: `SimpleTokenizer`, or `HFTokenizer` around one of transformers."""

    inner: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids."""
        with _SETTINGS:
            ids: Tensor = self.inner(list(texts), context_length=self.context_length)
        return ids.long()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text with start and end, before truncation."""
        if hasattr(self.inner, "encode"):
            return [len(self.inner.encode(text)) + 2 for text in texts]
        if not texts:
            return []
        clean = getattr(self.inner, "clean_fn", str)
        cleaned = [clean(text) for text in texts]
        with _SETTINGS:
            return [len(ids) for ids in self.inner.tokenizer(cleaned, verbose=False)["input_ids"]]


@dataclass(frozen=True)
class HfTokenizer:
    """A transformers tokenizer padded to the context length, as CLIP was trained."""

    inner: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids."""
        if not texts:
            return torch.empty(0, self.context_length, dtype=torch.long)
        with _SETTINGS:
            encoded = self.inner(
                list(texts), padding="max_length", truncation=True, max_length=self.context_length
            )
        return torch.tensor(encoded["input_ids"], dtype=torch.long).reshape(len(texts), self.context_length)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text with start and end, before truncation."""
        if not texts:
            return []
        with _SETTINGS:
            return [len(ids) for ids in self.inner(list(texts), verbose=False)["input_ids"]]
