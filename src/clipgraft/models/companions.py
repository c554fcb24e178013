"""Tokenizer and preprocessing of a raw model that `clipgraft.load` did not load, where the model tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from clipgraft.models.from_hf import HfPreprocess
from clipgraft.models.quiet import quiet
from clipgraft.models.sites import Site
from clipgraft.models.tokenizers import HfTokenizer, OpenClipTokenizer

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip, Preprocess, Tokenizer

_CLIP_VOCABULARY = 49408


def find_tokenizer(clip: Clip) -> Tokenizer | None:
    """CLIP's own tokenizer for its vocabulary, or the one beside a transformers model's weights."""
    if clip.family.name == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        embedding = clip.site_refs.get(Site("text", None, "token_embedding"))
        if embedding is None or embedding.shape[0] != _CLIP_VOCABULARY:
            return None
        return OpenClipTokenizer(SimpleTokenizer(), clip.context_length)
    inner = _from_same_place("AutoTokenizer", clip.model)
    return None if inner is None else HfTokenizer(inner, clip.context_length)


def find_preprocess(clip: Clip) -> Preprocess | None:
    """The transform that open_clip recorded on the model, or the processor beside a transformers model."""
    if clip.family.name == "open_clip":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        recorded = getattr(clip.model.visual, "preprocess_cfg", None)
        if recorded is None:
            return None
        transform: Preprocess = image_transform_v2(PreprocessCfg(**recorded), is_train=False)
        return transform
    processor = _from_same_place("AutoImageProcessor", clip.model)
    return None if processor is None else HfPreprocess(processor)


def _from_same_place(kind: str, model: nn.Module) -> Any:
    """What transformers finds at the folder or cached id that the model was loaded from, or None."""
    import transformers

    path = getattr(model, "name_or_path", "")
    if not path:
        return None
    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError):
        return None
