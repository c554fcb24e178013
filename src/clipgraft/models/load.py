"""`load`: from a name, id, folder or checkpoint to a `Clip`; and the messages when that cannot be done."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.tokenizers import HfTokenizer, OpenClipTokenizer

EMOJI_BASE = Path(__file__).parent.parent / "assets" / "emoji" / "base"
RANDOM_WEIGHTS = "none"
_KNOWN_HUB_IDS = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a base model with its tokenizer and preprocessing, in eval mode.

    Args:
        name: `emoji` (shipped with clipgraft), an open_clip model name (`ViT-B-32`) or open_clip JSON
            model config, `hf:` and a hub id or folder, or a local transformers or open_clip folder.
        pretrained: for open_clip names and configs: a tag (`laion2b_s34b_b79k`), a local checkpoint
            (`.pt`, `.safetensors`), or `none` for random weights.
        device: where the model goes.
        precision: type of the weights, `fp32`, `bf16` or `fp16`.
        seed: of random weights.

    Raises:
        ModelError: nothing of that name can be found, fetched or read.
    """
    if precision not in _WEIGHT_DTYPES:
        raise ModelError(f"precision '{precision}' is unknown: use one of {', '.join(_WEIGHT_DTYPES)}")
    pretrained = pretrained or ""
    with _quiet():
        clip = _dispatch(name, pretrained, seed)
    clip.model.to(device=device, dtype=_WEIGHT_DTYPES[precision])
    return clip.eval()


def _dispatch(name: str, pretrained: str, seed: int) -> Clip:
    folder = Path(name)
    if name == "emoji":
        return _load_hf(str(EMOJI_BASE), name)
    if name.startswith("hf:"):
        return _load_hf(name.removeprefix("hf:"), name)
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return _load_openclip(f"local-dir:{folder}", pretrained, name, seed)
        if (folder / "config.json").is_file():
            return _load_hf(name, name)
        raise ModelError(
            f"{folder} holds neither config.json (transformers) nor open_clip_config.json (open_clip): "
            "point at the folder that has one of them"
        )
    if folder.suffix in _CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"'{name}' is a checkpoint and does not say which architecture it is for: "
            f"give the model's name and the file apart, e.g. --model ViT-B-32 --pretrained {name}"
        )
    if folder.suffix == ".json":
        return _load_openclip(_register_config(folder), pretrained, name, seed)
    return _load_openclip(name, pretrained, name, seed)


def _load_openclip(model_name: str, pretrained: str, name: str, seed: int) -> Clip:
    import open_clip

    has_schema = ":" in model_name
    if not has_schema:
        _check_openclip_name(model_name, pretrained)
    if pretrained == RANDOM_WEIGHTS:
        torch.manual_seed(seed)
    weights = None if has_schema or pretrained == RANDOM_WEIGHTS else pretrained
    try:
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            model_name, pretrained=weights, require_pretrained=pretrained != RANDOM_WEIGHTS
        )
        inner = open_clip.get_tokenizer(model_name)
    except Exception as error:
        raise _openclip_failure(name, pretrained, error) from error
    family = family_of(model)
    tokenizer = OpenClipTokenizer(inner, family.context_length(model))
    return Clip(model, family, tokenizer, eval_transform, train_transform, Source(name, pretrained))


def _check_openclip_name(model_name: str, pretrained: str) -> None:
    """Refuse what open_clip would refuse, before it builds anything, with the nearest names."""
    import open_clip

    models = open_clip.list_models()
    if model_name.replace("/", "-") not in models:
        near = _nearest(model_name, [*models, "emoji", *(f"hf:{hub_id}" for hub_id in _KNOWN_HUB_IDS)])
        raise ModelError(
            f"no model '{model_name}': it is no open_clip name, local folder or JSON config{near}; "
            "transformers models are written hf:owner/name"
        )
    if pretrained == RANDOM_WEIGHTS or Path(pretrained).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(model_name.replace("/", "-"))
    if not pretrained:
        raise ModelError(
            f"model '{model_name}' needs weights: --pretrained takes a tag ({', '.join(tags[:6])}"
            f"{', …' if len(tags) > 6 else ''}), a local checkpoint, or '{RANDOM_WEIGHTS}' for random weights"
        )
    if Path(pretrained).suffix in _CHECKPOINT_SUFFIXES:
        raise ModelError(f"--pretrained {pretrained}: there is no such file")
    if pretrained not in tags:
        raise ModelError(
            f"model '{model_name}' has no pretrained tag '{pretrained}'{_nearest(pretrained, tags)}; "
            f"known tags: {', '.join(tags) or 'none'}"
        )


def _openclip_failure(name: str, pretrained: str, error: Exception) -> ModelError:
    if Path(pretrained).is_file():
        return ModelError(
            f"{pretrained} cannot be read as weights of {name}: {_first_line(error)}; "
            "check that the checkpoint is whole and --model names its architecture"
        )
    what = f"'{name}'" + (f" with pretrained '{pretrained}'" if pretrained else "")
    return ModelError(
        f"cannot fetch {what}: {_first_line(error)}; check the network connection, or download the weights "
        "elsewhere and pass the file with --pretrained FILE"
    )


def _register_config(path: Path) -> str:
    """Make a JSON model config known to open_clip under its file name; returns that name."""
    import open_clip

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model config {path}: there is no such file") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"model config {path} is not readable JSON: {_first_line(error)}") from error
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ModelError(
            f"model config {path} lacks {', '.join(missing)}: it must be an open_clip model config"
        )
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        plain.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(plain)
    return path.stem


def _load_hf(path: str, name: str) -> Clip:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    _check_model_type(path)
    try:
        model = CLIPModel.from_pretrained(path, dtype=torch.float32)
        inner = AutoTokenizer.from_pretrained(path)
        processor = AutoImageProcessor.from_pretrained(path)
    except Exception as error:
        raise _hf_failure(path, error) from error
    family = family_of(model)
    tokenizer = HfTokenizer(inner, family.context_length(model))
    return Clip(model, family, tokenizer, HfPreprocess(processor), None, Source(name))


def _check_model_type(path: str) -> None:
    config = Path(path) / "config.json"
    if Path(path).is_dir() and not config.is_file():
        raise ModelError(f"{path} has no config.json: it is no transformers model folder")
    if config.is_file():
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ModelError(f"{path} holds a '{kind}' model: clipgraft loads model_type 'clip'")


def _hf_failure(path: str, error: Exception) -> ModelError:
    if Path(path).is_dir():
        return ModelError(f"{path} cannot be read as a transformers CLIP folder: {_first_line(error)}")
    reasons = _names_in_chain(error)
    if "GatedRepoError" in reasons:
        return ModelError(f"hf:{path} is gated: accept its terms on the hub and log in with `hf auth login`")
    if reasons & {"RepositoryNotFoundError", "HFValidationError"}:
        return ModelError(
            f"the hub has no model '{path}'{_nearest(path, _KNOWN_HUB_IDS)}; check the spelling"
        )
    return ModelError(
        f"cannot fetch hf:{path}: {_first_line(error)}; check the network connection, or pass a local folder"
        f"{_nearest(path, _KNOWN_HUB_IDS)}"
    )


def _names_in_chain(error: BaseException | None) -> set[str]:
    names: set[str] = set()
    while error is not None:
        names.update(kind.__name__ for kind in type(error).__mro__)
        error = error.__cause__ or error.__context__
    return names


def _first_line(error: BaseException) -> str:
    if "UnpicklingError" in _names_in_chain(error):
        return "it is damaged, no PyTorch checkpoint, or holds pickled code, which is never run"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:;")[:200]


def _nearest(given: str, known: Sequence[str]) -> str:
    """`; did you mean a or b?` for the nearest known names, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(by_lower[name] for name in close)}?)" if close else ""


class HfPreprocess:
    """A transformers image processor as a transform, PIL image -> (3, H, W), that workers can carry."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __repr__(self) -> str:
        return repr(self.processor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own log lines and bars out of the user's terminal while a model loads."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)
