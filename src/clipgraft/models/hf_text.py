"""Text towers of transformers inside open_clip (`HFTextEncoder`): XLM-R, NLLB, mT5, BERT, their poolers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.encoder_sites import encoder_groups, encoder_refs, module_ref
from clipgraft.models.padding import hf_ends, longest
from clipgraft.models.sites import Site, SiteRef

# The projection is a Linear, an MLP of two without biases, or nothing.
_PROJECTIONS = {"proj": "proj", "proj.0": "proj_fc1", "proj.2": "proj_fc2"}


def is_hf_text(text: nn.Module) -> TypeGuard[Any]:
    """Whether a text tower is open_clip's `HFTextEncoder`, told by its parts."""
    return all(hasattr(text, name) for name in ("transformer", "pooler", "config", "proj"))


def hf_text_refs(text: nn.Module, prefix: str) -> Iterator[SiteRef]:
    """The sites of an `HFTextEncoder` that lies at `prefix` in its model."""
    refs = encoder_refs(text.transformer, f"{prefix}.transformer", "text")  # type: ignore[arg-type]
    pools = getattr(text.pooler, "use_pooler_output", False)
    # transformers builds a pooler even where open_clip averages instead: nothing there would act.
    yield from (ref for ref in refs if pools or not ref.site.role.startswith("pool_"))
    for path, role in _PROJECTIONS.items():
        yield from module_ref(text, path, prefix, Site("text", None, role))


def hf_text_ends(text: Any, tokens: Tensor) -> Tensor | None:
    """(N,) position of the last token that is no padding, which open_clip masks; None where none is cut."""
    return hf_ends(text.config, tokens)


def hf_features_on_meta(text: Any, tokens: Tensor) -> Tensor:
    """The text tower on the meta device: without the mask of padding, of which transformers asks a number."""
    pooled = text.pooler(text.transformer(input_ids=tokens), torch.ones_like(tokens))
    features: Tensor = text.proj(pooled)
    return features


def check_pooler(text: nn.Module) -> None:
    """Refuse the one pooler of open_clip that cannot run; raises ModelError."""
    if type(text.pooler).__name__ == "MaxPooler":
        raise ModelError(
            "the text tower pools with open_clip's max_pooler, which gives torch a mask of the wrong type "
            "and cannot run: build the model with hf_pooler_type mean_pooler or cls_pooler"
        )


def hf_context_length(text: Any) -> int:
    """How many tokens the text tower takes."""
    return longest(text.config)


def hf_text_groups(text: nn.Module) -> list[list[nn.Parameter]]:
    """`Family.tower_groups` of the text tower."""
    projection = text.proj
    assert isinstance(projection, nn.Module)
    return encoder_groups(text, [projection])
