"""Padding of encoders that see all tokens: which ids are padding, and what of it can be cut.

A causal tower cannot see what follows its pooled token. An encoder such as BERT sees everything, so that
padding has to be hidden from it by a mask; then what the mask hides at the end can be cut, and changes
nothing but the time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clipgraft.errors import ModelError
from clipgraft.models.family import LARGEST_ID, pooled_positions
from clipgraft.models.hf import LARGEST_ID_AS_EOS

# Attention alone moves anything between tokens, and it takes a mask: no convolutions, no Fourier transforms.
_MASKED = frozenset(
    {
        "altclip_text_model",
        "bert",
        "camembert",
        "chinese_clip_text_model",
        "distilbert",
        "m2m_100",
        "mpnet",
        "mt5",
        "nllb-moe",
        "roberta",
        "t5",
        "umt5",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)
# Their positions begin behind the id of padding.
_SHIFTED = frozenset({"altclip_text_model", "camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
_USUAL_LENGTH = 77


def hides_padding(config: Any) -> bool:
    """Whether an encoder of this configuration of transformers gives the same without its padding."""
    return str(getattr(config, "model_type", "")) in _MASKED and pad_id(config) is not None


def pad_id(config: Any) -> int | None:
    """The id that is padding; None where a configuration names none."""
    found = getattr(config, "pad_token_id", None)
    return None if found is None else int(found)


def attention_mask(tokens: Tensor, padding: int) -> Tensor:
    """(N, L) ids -> (N, L) int64, 0 at padding and 1 elsewhere, as tokenizers of transformers give it."""
    return tokens.ne(padding).long()


def last_positions(tokens: Tensor, padding: int) -> Tensor:
    """(N, L) ids -> (N,) position of the last one that is no padding; L - 1 for rows of padding alone."""
    return tokens.shape[1] - 1 - tokens.ne(padding).flip(1).int().argmax(dim=1)


def longest(config: Any) -> int:
    """How many tokens an encoder takes; as many as open_clip's tokenizers make where it has no limit (T5)."""
    rows = int(getattr(config, "max_position_embeddings", 0) or 0)
    shifted = getattr(config, "model_type", "") in _SHIFTED
    return rows - (int(config.pad_token_id) + 1 if shifted else 0) if rows else _USUAL_LENGTH


def check_padding(config: Any, tokenizer: Any, where: object) -> None:
    """Refuse a tokenizer of transformers that pads with another id than a text tower of `config` hides.

    Raises:
        ModelError: naming both ids.
    """
    hidden = None if _is_clip(config) else pad_id(config)
    pads = getattr(tokenizer, "pad_token_id", None)
    if hidden is not None and pads is not None and pads != hidden:
        raise ModelError(
            f"{where}: the tokenizer pads with id {pads}, but the text tower hides {hidden} as padding and "
            "would read the padding as words; take the tokenizer that the text tower was trained with"
        )


def hf_mask(config: Any, tokens: Tensor) -> Tensor | None:
    """The mask of padding for a text encoder of transformers; None where it needs none or names no padding.

    CLIP's text tower is causal, and the id that it pads with is the one that it pools at. On the meta device
    there is none either: transformers asks whether the mask hides anything, and no number is there.
    """
    padding = pad_id(config)
    bare = padding is None or _is_clip(config) or tokens.is_meta
    return None if bare or padding is None else attention_mask(tokens, padding)


def hf_ends(config: Any, tokens: Tensor) -> Tensor | None:
    """(N,) position behind which a text encoder of transformers may be cut; None where it may not be."""
    if _is_clip(config):
        eos = int(config.eos_token_id)
        return pooled_positions(tokens, LARGEST_ID if eos == LARGEST_ID_AS_EOS else eos)
    padding = pad_id(config)
    return last_positions(tokens, padding) if padding is not None and hides_padding(config) else None


def _is_clip(config: Any) -> bool:
    return str(getattr(config, "model_type", "")) == "clip_text_model"
