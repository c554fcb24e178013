"""The text tower apart, as the text encoder of an image generator: for diffusers, and for ComfyUI.

Both take CLIP's own text transformer and its projection under transformers' names. transformers may keep a
`CLIPTextModel` under shorter names, which older releases and ComfyUI do not know; so the model with
projection is written, whose names are the same everywhere and which `CLIPTextModel` opens as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from clipgraft.errors import ModelError
from clipgraft.files import atomic_path, write_json
from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job, inside
from clipgraft.models.forms.libraries import as_transformers
from clipgraft.models.processors import HfTokenizer
from clipgraft.ours import MARK, version_mark
from clipgraft.writing import size_of

_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True)
class _TextEncoder:
    """A text tower: its configuration, weights under transformers' names, and tokenizer."""

    config: Any
    weights: dict[str, Tensor]
    tokenizer: HfTokenizer | None


def write_diffusers(job: Job) -> Differences:
    """`text_encoder/` and `tokenizer/`, to put in place of those of a pipeline's folder."""
    encoder = _encoder(job)
    if encoder.tokenizer is None:
        raise ModelError("this model has no tokenizer: load it with clipgraft.load(...)")
    job.tell(f"writing {size_of(encoder.weights) / 1e6:,.1f} MB")
    folder = job.target / _ENCODER
    folder.mkdir()
    # The configuration of a whole model keeps its width of features elsewhere.
    dim = encoder.weights["text_projection.weight"].shape[0]
    said = {
        **encoder.config.to_dict(),
        "projection_dim": dim,
        "architectures": ["CLIPTextModelWithProjection"],
    }
    write_json(folder / "config.json", said)
    save_file(encoder.weights, folder / "model.safetensors", metadata=_metadata())
    inner = encoder.tokenizer.inner
    inner.save_pretrained(job.target / _TOKENIZER)
    _save_pieces(inner, job)
    return {}


def _save_pieces(inner: Any, job: Job) -> None:
    """`vocab.json` and `merges.txt`, which the tokenizer of older transformers reads."""
    model = getattr(getattr(inner, "backend_tokenizer", None), "model", None)
    if model is not None:
        model.save(str(job.target / _TOKENIZER))


def write_comfyui(job: Job) -> None:
    """One file for ComfyUI's folder `models/text_encoders`."""
    encoder = _encoder(job)
    name = _comfyui_name(encoder)
    job.tell(f"writing {size_of(encoder.weights) / 1e6:,.1f} MB of a {name}")
    with atomic_path(job.target, size_of(encoder.weights)) as temporary:
        save_file(encoder.weights, temporary, metadata=_metadata())


def _metadata() -> dict[str, str]:
    return {"format": "pt", MARK: version_mark()}


def _encoder(job: Job) -> _TextEncoder:
    from transformers import CLIPModel

    twin = as_transformers(job.clip, job.tell)
    model: Any = twin.model
    if type(model) is not CLIPModel:
        raise ModelError(
            f"image generators take the text encoder of CLIP, and this model is a {type(model).__name__}: "
            "write another form"
        )
    twin.tokenize("")
    weights = {
        name: weight.contiguous()
        for name, weight in model.state_dict().items()
        if name.startswith(("text_model.", "text_projection.")) and not name.endswith("position_ids")
    }
    tokenizer = twin.tokenizer if isinstance(twin.tokenizer, HfTokenizer) else None
    return _TextEncoder(model.config.text_config, weights, tokenizer)


_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
COMFYUI_ENCODERS: dict[str, tuple[int, int, int, int, str]] = {
    "clip_l": (12, 768, 12, 3072, "quick_gelu"),
    "clip_h": (24, 1024, 16, 4096, "gelu"),
    "clip_g": (32, 1280, 20, 5120, "gelu"),
}
"""Layers, width, heads, width of the MLPs and activation of what ComfyUI builds; it reads none of a file."""
_COMFYUI_TEXT = (77, 49_408)


def _comfyui_name(encoder: _TextEncoder) -> str:
    """Which of ComfyUI's encoders this one is; raises ModelError for any other, which it would misread."""
    config = encoder.config
    shape = tuple(getattr(config, name) for name in _SHAPE)
    text = (config.max_position_embeddings, config.vocab_size)
    for name, wanted in COMFYUI_ENCODERS.items():
        square = encoder.weights["text_projection.weight"].shape == (wanted[1], wanted[1])
        if shape == wanted and text == _COMFYUI_TEXT and square:
            return name
    told = json.dumps(dict(zip(_SHAPE, shape, strict=True)))
    raise ModelError(
        f"ComfyUI has text encoders of the shapes of ViT-L-14 of OpenAI, ViT-H-14 and ViT-bigG-14 alone, and "
        f"this one has {told}: write the diffusers form, which keeps any"
    )


DIFFUSERS = FormSpec(
    write_diffusers,
    2,
    f"{_ENCODER}/config.json",
    (*inside(_ENCODER, "model.safetensors"), *inside(_TOKENIZER, *TOKENIZER_FILES)),
)
COMFYUI = FormSpec(None, 2, suffixes=(".safetensors",), write_file=write_comfyui)
