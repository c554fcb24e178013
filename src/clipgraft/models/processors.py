"""Tokenizers and image preprocessing of both families: one interface each, and from one to the other."""

from __future__ import annotations

import copy
import re
import string
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.family import Family
from clipgraft.models.hub import one_line
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.siglip import pack_patches
from clipgraft.models.sites import Site

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip

Preprocess: TypeAlias = Callable[[Picture], Tensor]
OWN_TOWERS = "own towers"
"""The name of the family of models that bring their tokenizer and preprocessing along."""
_CLIP_VOCABULARY = 49408
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


class Tokenizer(Protocol):
    """Strings to ids, and how long each would be without the context's limit."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids, truncated and padded."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text, start and end tokens included, before truncation."""


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


class HfPreprocess:
    """A transformers image processor as a transform that workers can carry.

    PIL image -> (3, H, W), or (1, 1 + patches, dim) for `Siglip2Model` (`clipgraft.models.siglip`).
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        found = self.processor(image, return_tensors="pt")
        pixels: Tensor = found["pixel_values"][0]
        return pack_patches(pixels, found["spatial_shapes"][0]) if "spatial_shapes" in found else pixels

    @property
    def max_patches(self) -> int | None:
        """How many patches an image is padded to; None for processors that give pixels."""
        found = getattr(self.processor, "max_num_patches", None)
        return None if found is None else int(found)

    def __repr__(self) -> str:
        return repr(self.processor)


def find_tokenizer(family: Family, model: nn.Module) -> Tokenizer | None:
    """CLIP's own tokenizer for its vocabulary, or the one beside a transformers model's weights.

    A model of the user's own towers brings its own.
    """
    if family.name == OWN_TOWERS:
        own: Tokenizer | None = getattr(model, "tokenizer", None)
        return own
    if family.name == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        with rwlock_of(model).read():
            refs = family.site_refs(model)
        embedding = refs.get(Site("text", None, "token_embedding"))
        if embedding is None or embedding.shape[0] != _CLIP_VOCABULARY:
            return None
        return OpenClipTokenizer(SimpleTokenizer(), family.context_length(model))
    inner = _from_same_place("AutoTokenizer", model)
    return None if inner is None else HfTokenizer(inner, family.context_length(model))


def find_preprocess(family: Family, model: nn.Module) -> Preprocess | None:
    """The transform that open_clip recorded on the model, or the processor beside a transformers model."""
    if family.name == OWN_TOWERS:
        own: Preprocess | None = getattr(model, "preprocess", None)
        return own
    if family.name == "open_clip":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        recorded = getattr(model.visual, "preprocess_cfg", None)
        if recorded is None:
            return None
        transform: Preprocess = image_transform_v2(PreprocessCfg(**recorded), is_train=False)
        return transform
    processor = _from_same_place("AutoImageProcessor", model)
    return None if processor is None else HfPreprocess(processor)


def _from_same_place(kind: str, model: nn.Module) -> Any:
    """What transformers finds at the folder or cached id that the model was loaded from, or None."""
    import transformers

    path = getattr(model, "name_or_path", "")
    if not path:
        return None
    try:
        with quiet_libraries():
            return getattr(transformers, kind).from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError):
        return None


def check_preprocess(preprocess: Any, shape: tuple[int, ...], where: object) -> None:
    """Try a preprocessing of a stranger's file on one small image.

    Raises:
        ModelError: it gives something else than what the model takes, of that shape for one image.
    """
    image = Image.new("RGB", (9, 8))
    try:
        given = tuple(preprocess(image).shape)
    except Exception as error:
        raise ModelError(f"{where}: its image preprocessing cannot be used: {one_line(error)}") from error
    if given != shape:
        raise ModelError(
            f"{where}: its image preprocessing gives {given} where the model takes {shape}: "
            "correct its preprocessor_config.json or preprocess_cfg"
        )


# From one library to the other.


@dataclass(frozen=True)
class ImageSettings:
    """How a model's images are prepared.

    Attributes:
        size: (height, width) in pixels.
        mean: of each channel, of 0..1.
        std: of each channel, of 0..1.
        interpolation: `bicubic` or `bilinear`.
        resize_mode: open_clip's word: `shortest` (then the middle is cut out), `squash` or `longest`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str


def image_settings(clip: Clip) -> ImageSettings | None:
    """What a model's preprocessing does; None for a model that comes without.

    Raises:
        ModelError: a transformers processor that does something else.
    """
    if clip.family.name == "open_clip":
        recorded = getattr(clip.model.visual, "preprocess_cfg", None)
        return None if recorded is None else _recorded_settings(recorded)
    preprocess = clip.preprocess or find_preprocess(clip.family, clip.model)
    return _processor_settings(preprocess.processor) if isinstance(preprocess, HfPreprocess) else None


def image_processor(settings: ImageSettings) -> Any:
    """The `transformers.CLIPImageProcessor` of the same settings; raises ModelError where there is none.

    Its pixels differ from those of open_clip's transform: it resizes with PyTorch's 8-bit kernel instead of
    Pillow's (at most two grey levels, mostly none), and rounds an odd margin of the cut down.
    """
    from transformers import CLIPImageProcessor

    height, width = settings.size
    common = {
        "resample": next(code for code, name in _RESAMPLE.items() if name == settings.interpolation),
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "crop_size": {"height": height, "width": width},
    }
    if settings.resize_mode == "squash":
        return CLIPImageProcessor(size={"height": height, "width": width}, do_center_crop=False, **common)
    if settings.resize_mode == "shortest" and height == width:
        return CLIPImageProcessor(size={"shortest_edge": height}, **common)
    raise ModelError(
        f"images resized to {height}x{width} in mode '{settings.resize_mode}' have no CLIPImageProcessor: "
        "keep the model in the open_clip form"
    )


def preprocess_config(settings: ImageSettings) -> dict[str, Any]:
    """The same settings as open_clip's `PreprocessCfg` takes them."""
    height, width = settings.size
    return {
        "size": height if height == width else [height, width],
        "mean": list(settings.mean),
        "std": list(settings.std),
        "interpolation": settings.interpolation,
        "resize_mode": settings.resize_mode,
    }


def to_hf_tokenizer(clip: Clip) -> HfTokenizer | None:
    """A model's tokenizer as one of transformers; None for a model that comes without.

    open_clip repairs texts with ftfy first (HTML entities, curly quotes, ligatures, broken encodings) and
    transformers does not; open_clip takes `<start_of_text>` and `<end_of_text>` in a text for the tokens
    themselves and transformers splits them. All other texts get the same ids.

    Raises:
        ModelError: a tokenizer that does more than transformers can.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tokenizer = clip.tokenizer or find_tokenizer(clip.family, clip.model)
    if tokenizer is None or isinstance(tokenizer, HfTokenizer):
        return tokenizer
    inner: Any = tokenizer.inner if isinstance(tokenizer, OpenClipTokenizer) else tokenizer
    usual = isinstance(inner, SimpleTokenizer) and _cleaning(inner) == "lower"
    if usual and inner.reduction_fn is None and len(inner.all_special_ids) == 2:
        return HfTokenizer(_bpe_tokenizer(inner, clip.context_length), clip.context_length)
    bare = isinstance(inner, HFTokenizer) and not inner.strip_sep_token and not inner.tokenizer_mode
    if bare and _cleaning(inner) == "whitespace":
        return HfTokenizer(inner.tokenizer, clip.context_length)
    if bare and _cleaning(inner) == "canonicalize" and hasattr(inner.tokenizer, "backend_tokenizer"):
        return HfTokenizer(_canonicalizing(inner.tokenizer), clip.context_length)
    raise ModelError(
        f"{type(inner).__name__} with its settings has no counterpart in transformers: "
        "keep the model in the open_clip form"
    )


def to_openclip_tokenizer(clip: Clip) -> OpenClipTokenizer | None:
    """A transformers model's tokenizer as one of open_clip; None for a model that comes without.

    CLIP's own becomes `SimpleTokenizer`, any other is wrapped in `HFTokenizer`, which also repairs texts.

    Raises:
        ModelError: clip's tokenizer is not one of transformers.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tokenizer = clip.tokenizer or find_tokenizer(clip.family, clip.model)
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, HfTokenizer):
        raise ModelError(
            f"a {type(tokenizer).__name__} cannot be used by open_clip: load the model with clipgraft.load"
        )
    length = clip.context_length
    clips_own = SimpleTokenizer(context_length=length)
    is_clip = "CLIPTokenizer" in type(tokenizer.inner).__name__  # which lowers case
    if is_clip and tokenizer.inner.get_vocab() == _vocabulary(clips_own):
        return OpenClipTokenizer(clips_own, length)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        tokenizer.inner.save_pretrained(folder)
        return OpenClipTokenizer(HFTokenizer(folder, context_length=length), length)


def tokenizer_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What open_clip's `text_cfg` says of a tokenizer whose files lie beside it; {} for `SimpleTokenizer`."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    inner = tokenizer.inner if isinstance(tokenizer, OpenClipTokenizer) else None
    if isinstance(inner, HFTokenizer):
        kwargs: dict[str, Any] = {"clean": _cleaning(inner)}
        if inner.strip_sep_token:
            kwargs["strip_sep_token"] = True
        mode = {"tokenizer_mode": inner.tokenizer_mode} if inner.tokenizer_mode else {}
        # open_clip looks in the folder of the configuration, whatever name is given here.
        return {"hf_tokenizer_name": ".", "tokenizer_kwargs": kwargs, **mode}
    if isinstance(inner, SimpleTokenizer) and _cleaning(inner) != "lower":
        return {"tokenizer_kwargs": {"clean": _cleaning(inner)}}
    return {}


def hf_tokenizer_files(clip: Clip) -> Any:
    """The transformers tokenizer to put beside an export, even if texts need `cleaning_of` first; or None."""
    from open_clip.tokenizer import SimpleTokenizer

    inner = getattr(clip.tokenizer, "inner", None)
    if isinstance(inner, SimpleTokenizer):
        return _bpe_tokenizer(inner, clip.context_length)
    return inner if isinstance(clip.tokenizer, HfTokenizer) else getattr(inner, "tokenizer", None)


def cleaning_of(tokenizer: Tokenizer | None) -> str | None:
    """open_clip's name for what it does to texts before it splits them: `lower`, `whitespace`, …"""
    inner = tokenizer.inner if isinstance(tokenizer, OpenClipTokenizer) else None
    return _cleaning(inner) or None if hasattr(inner, "clean_fn") else None


def _recorded_settings(recorded: Any) -> ImageSettings:
    size = recorded["size"]
    height, width = (size, size) if isinstance(size, int) else size
    interpolation = "bilinear" if recorded["interpolation"] == "bilinear" else "bicubic"
    mean, std = tuple(recorded["mean"]), tuple(recorded["std"])
    return ImageSettings((height, width), mean, std, interpolation, recorded["resize_mode"])


def _processor_settings(processor: Any) -> ImageSettings:
    says = processor.to_dict()
    known = {name: int(value) for name, value in dict(says["size"]).items() if value is not None}
    crop = says.get("crop_size") if says.get("do_center_crop") else None
    cut = (int(crop["height"]), int(crop["width"])) if crop else None
    steps = ("do_resize", "do_rescale", "do_normalize")
    scaled = all(says.get(step) for step in steps) and abs(says["rescale_factor"] * 255 - 1) < 1e-6
    interpolation = _RESAMPLE.get(int(says["resample"]))
    if scaled and not says.get("do_pad") and interpolation:
        rest = (tuple(says["image_mean"]), tuple(says["image_std"]), interpolation)
        edge = known.get("shortest_edge")
        if set(known) == {"shortest_edge"} and edge and cut == (edge, edge):
            return ImageSettings((edge, edge), *rest, "shortest")
        target = (known.get("height", 0), known.get("width", 0))
        if set(known) == {"height", "width"} and cut in (None, target):
            return ImageSettings(target, *rest, "squash")
    raise ModelError(
        f"{type(processor).__name__} with size {known} and crop {cut} prepares images in a way that "
        "open_clip has no setting for: keep the model in the transformers form"
    )


def _cleaning(inner: Any) -> str:
    from open_clip.tokenizer import get_clean_fn

    names = ("lower", "whitespace", "canonicalize")
    return next((name for name in names if get_clean_fn(name) is inner.clean_fn), "")


def _vocabulary(inner: Any) -> dict[str, int]:
    """A `SimpleTokenizer`'s pieces, its start and end tokens under the names transformers gives them."""
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {renamed.get(piece, piece): index for piece, index in inner.encoder.items()}


def _canonicalizing(inner: Any) -> Any:
    """A tokenizer that does to texts first what open_clip does for SigLIP, ftfy's repairs aside."""
    from tokenizers import Regex, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(inner.backend_tokenizer)
    marks = "".join(re.escape(mark) for mark in string.punctuation)
    steps = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{marks}]"), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    own = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([*steps, *own])
    # A class of its own, such as Gemma's, makes its steps anew when it is loaded, and would lose these.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=inner.model_max_length,
        padding_side=inner.padding_side,
        **inner.special_tokens_map,
    )


def _bpe_tokenizer(inner: Any, length: int) -> Any:
    from transformers import CLIPTokenizer

    merges = sorted(inner.bpe_ranks, key=inner.bpe_ranks.__getitem__)
    # A caption that spells a start or end token is plain text to open_clip, whose own have other spellings.
    return CLIPTokenizer(
        vocab=_vocabulary(inner), merges=merges, model_max_length=length, split_special_tokens=True
    )
