"""`load`: from a name, id, folder or checkpoint to a `Clip`; open_clip's here, transformers' in `load_hf`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.files import file_exists, write_json
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.configs import (
    CONFIG_FILE,
    HUB,
    borrows,
    check_known,
    check_text_tower,
    config_failure,
    model_config,
    read_config,
)
from clipgraft.models.hub import fetch_reason, hub_access, nearest, one_line, tell_fetch
from clipgraft.models.library_calls import no_initialization, quiet_libraries, seeded
from clipgraft.models.load_hf import load_hf
from clipgraft.models.padding import check_padding
from clipgraft.models.processors import OpenClipTokenizer, check_preprocess
from clipgraft.models.state_dict import load_weights
from clipgraft.models.weights_file import UnreadableError, read_weights
from clipgraft.process_memory import trim_heap

log = logging.getLogger("clipgraft")
EMOJI_BASE = Path(__file__).parent.parent / "assets" / "emoji" / "base"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
RANDOM_WEIGHTS = "none"
_BIG_VISION = (".npz", ".npy")
_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip looks for them
_PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a base model with its tokenizer and preprocessing, in eval mode.

    Args:
        name: `emoji` (shipped with clipgraft), an open_clip model name (`ViT-B-32`) or open_clip JSON
            model config, `hf:` and a hub id or folder, `hf-hub:` and the hub id of an open_clip model, or a
            local transformers or open_clip folder.
        pretrained: for open_clip names and configs: a tag (`laion2b_s34b_b79k`), a local checkpoint
            (`.pt`, `.safetensors`), or `none` for random weights. The others bring their own weights.
        device: where the model goes.
        precision: type of the weights, `fp32`, `bf16` or `fp16`.
        seed: of random weights.

    Raises:
        ModelError: nothing of that name can be found, fetched or read.
    """
    if precision not in _WEIGHT_DTYPES:
        raise ModelError(f"precision '{precision}' is unknown: use one of {', '.join(_WEIGHT_DTYPES)}")
    with quiet_libraries():
        clip = _dispatch(str(name), str(pretrained or ""), seed)
    for note in clip.notes:
        log.warning("%s", note)
    if precision == "fp16":
        _ = clip.fingerprint  # fp16 drops bits that the fingerprint of fp32 and bf16 weights counts
    clip.model.to(device=device, dtype=_WEIGHT_DTYPES[precision])
    trim_heap()  # of what was built to be replaced by the file's weights
    return clip.eval()


def _dispatch(name: str, pretrained: str, seed: int) -> Clip:
    path = Path(name)
    brings_weights = name == "emoji" or name.startswith(("hf:", "hf-hub:")) or path.is_dir()
    if brings_weights and pretrained:
        if _is_openclip(name) and file_exists(pretrained):
            return with_weights(_dispatch(name, "", seed), pretrained)
        raise ModelError(f"'{name}' brings its own weights: leave out `pretrained` {pretrained}")
    if name == "emoji":
        return load_hf(str(EMOJI_BASE), name)
    if name.startswith("hf:"):
        return load_hf(name.removeprefix("hf:"), name)
    if path.is_dir():
        return _load_folder(path, name)
    if path.suffix in CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"'{name}' is a checkpoint and does not say which architecture it is for: "
            f"give the model's name and the file apart, e.g. `model='ViT-B-32'` and `pretrained='{name}'`"
        )
    if path.suffix == ".json":
        return load_config(path, pretrained, seed)
    return _load_named(name, pretrained, seed)


def _load_folder(folder: Path, name: str) -> Clip:
    if (folder / CONFIG_FILE).is_file():
        return _load_openclip_folder(folder, name)
    if (folder / "config.json").is_file():
        return load_hf(name, name)
    raise ModelError(
        f"{folder} holds neither config.json (transformers) nor {CONFIG_FILE} (open_clip): "
        "point at the folder that has one of them"
    )


def _load_named(name: str, pretrained: str, seed: int) -> Clip:
    """An open_clip model by name with a tag, a checkpoint or random weights; or `hf-hub:` and a hub id.

    Raises:
        ModelError: no such name or tag, or the weights cannot be fetched or read.
    """
    if name.startswith(HUB):
        return _load_hub(name)
    # open_clip's tokenizer look-up does not know the spelling ViT-B/32, which its model look-up takes.
    model_name = name.replace("/", "-")
    _check_name(name, model_name, pretrained)
    is_file, random = file_exists(pretrained), pretrained == RANDOM_WEIGHTS
    config = model_config(name)
    with hub_access(not (is_file or random) or borrows(config)) as offline:
        try:
            check_text_tower(config, name)
            tag = None if is_file or random else pretrained
            weights = None if random else _file_of_tag(model_name, tag) if tag else Path(pretrained)
            drawn = weights is None or weights.suffix in _BIG_VISION
            model, train, evaluate = _named_model(model_name, tag, seed, random=drawn)
            inner = _tokenizer(config["text_cfg"], None, model_name)
        except ModelError:
            raise
        except Exception as error:
            raise _fetch_failure(name, pretrained, error, offline) from error
    notes = (
        [] if weights is None else _put(model, weights, name) if is_file else _put_tag(model, weights, name)
    )
    return _clip(model, inner, evaluate, train, Source(name, pretrained), notes)


def _load_openclip_folder(folder: Path, name: str) -> Clip:
    """A local folder with `open_clip_config.json` and weights, as `push_to_hf_hub` lays one out.

    Raises:
        ModelError: open_clip cannot build a model from it.
    """
    config = read_config(folder / CONFIG_FILE)
    weights = _find_weights(folder)
    if weights is None:
        raise ModelError(
            f"{folder} holds no pretrained weights beside {CONFIG_FILE}: they are called "
            f"{_PREFERRED[0]} or {_PREFERRED[2]}; copy them there"
        )
    return _build(config, folder, weights, folder, Source(name))


def load_config(path: Path, pretrained: str, seed: int) -> Clip:
    """A JSON model config, bare or as in `open_clip_config.json`, with a local checkpoint or random weights.

    Raises:
        ModelError: the config is not one of open_clip, or the checkpoint is damaged or of another model.
    """
    config = read_config(path)
    random = pretrained == RANDOM_WEIGHTS
    if not random:
        _check_checkpoint(path, pretrained)
    source = Source(str(path), pretrained)
    return _build(config, path, None if random else Path(pretrained), None, source, seed)


def _find_weights(folder: Path) -> Path | None:
    """The weights of an open_clip folder, chosen as open_clip chooses; None if there are none."""
    files = sorted(file for file in folder.iterdir() if file.suffix in CHECKPOINT_SUFFIXES and file.is_file())
    preferred = [folder / name for name in _PREFERRED if folder / name in files]
    tensors = [file for file in files if file.suffix == ".safetensors"]
    return next(iter([*preferred, *tensors, *files]), None)


def _load_hub(name: str) -> Clip:
    """A hub repository with `open_clip_config.json`, fetched file by file."""
    from open_clip.pretrained import download_pretrained_from_hf

    repository = name.removeprefix(HUB)
    with hub_access(True) as offline:
        try:
            config = read_config(Path(download_pretrained_from_hf(repository, filename=CONFIG_FILE)))
            tell_fetch(repository, _HUB_WEIGHTS)
            weights = Path(download_pretrained_from_hf(repository))
        except ModelError:
            raise
        except Exception as error:
            raise _fetch_failure(name, "", error, offline) from error
    return _build(config, name, weights, None, Source(name))


def _fetch_failure(name: str, pretrained: str, error: Exception, offline: str) -> ModelError:
    what = f"'{name}'" + (f" with pretrained '{pretrained}'" if pretrained else "")
    instead = "download the weights elsewhere and pass the file as `pretrained`"
    if name.startswith(HUB):
        instead = "pass a local folder"
    return ModelError(f"cannot fetch {what}: {fetch_reason(error, offline)}, or {instead}")


def _build(
    config: Mapping[str, Any],
    where: object,
    weights: Path | None,
    folder: Path | None,
    source: Source,
    seed: int = 0,
) -> Clip:
    """A model of a checked configuration, with the weights of a file, or random ones.

    `where` is named in errors; `folder` holds the tokenizer's files, None where the configuration names them.
    """
    settings = config["model_cfg"]
    with hub_access(borrows(settings, tokenizer=folder is None)), tempfile.TemporaryDirectory() as made:
        # A folder rather than open_clip's registry: a config named ViT-B-32.json must not become ViT-B-32.
        write_json(Path(made) / CONFIG_FILE, config)
        try:
            check_text_tower(settings, where)
            drawn = weights is None or weights.suffix in _BIG_VISION
            model, train, evaluate = _named_model(f"local-dir:{made}", None, seed, random=drawn)
            inner = _tokenizer(settings["text_cfg"], folder)
        except ModelError:
            raise
        except Exception as error:
            raise config_failure(where, error) from error
    notes = [] if weights is None else _put(model, weights, str(where))
    try:
        return _clip(model, inner, evaluate, train, source, notes)
    except ModelError:
        raise
    except Exception as error:
        raise config_failure(where, error) from error


def _named_model(name: str, tag: str | None, seed: int, *, random: bool) -> tuple[nn.Module, Any, Any]:
    """open_clip's model and transforms as a tag has them, with `random` weights of a seed or none yet."""
    import open_clip

    with seeded(seed) if random else no_initialization():
        model, train, evaluate = open_clip.create_model_and_transforms(
            name, pretrained=tag, load_weights=False, pretrained_text=False, weights_only=True
        )
    return model, train, evaluate


def _file_of_tag(name: str, tag: str) -> Path:
    """The weights of a tag as open_clip chooses their file, fetched if need be."""
    import open_clip

    _tell_tag(name, tag)
    return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))


def _tell_tag(name: str, tag: str) -> None:
    """Say what is fetched for a tag, as `open_clip.download_pretrained` chooses it."""
    import open_clip

    config = open_clip.get_pretrained_cfg(name, tag)
    repository, _, file = str(config.get("hf_hub") or "").rpartition("/")
    if repository:
        safe = str(Path(file).with_suffix(".safetensors")) if file else ""
        tell_fetch(repository, [safe, file] if file else _HUB_WEIGHTS)
    elif url := config.get("url"):
        log.info("%s / %s: weights are from %s, fetched if they are not here yet", name, tag, url)


def _put(model: nn.Module, weights: Path, name: str) -> list[str]:
    """Give a model the weights of a file; returns what the user is to know of it."""
    refused = f"{weights} cannot be read as weights of {name}"
    if weights.suffix in _BIG_VISION:
        import open_clip

        try:
            open_clip.load_checkpoint(model, str(weights))
        except Exception as error:
            raise ModelError(f"{refused}: {one_line(error)}") from error
        return []
    try:
        file = read_weights(weights)
    except UnreadableError as error:
        raise ModelError(f"{refused}: {error}") from error
    try:
        notes = load_weights(model, file)
    except Exception as error:
        reason = f"{one_line(error, 500)}; check that `model` names its architecture"
        raise ModelError(f"{refused}: {reason}") from error
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    if file.torchscript and not quick:
        notes.append(
            "OpenAI's archives are of models with QuickGELU, and this one has GELU: take the model's name "
            "with -quickgelu, or quick_gelu in its config"
        )
    return [f"{weights}: {note}" for note in notes]


def _put_tag(model: nn.Module, weights: Path, name: str) -> list[str]:
    """The same for the file of a tag; names of others' models (MobileCLIP) open_clip alone translates."""
    import open_clip

    try:
        return _put(model, weights, name)
    except ModelError as refused:
        try:
            open_clip.load_checkpoint(model, str(weights))
        except Exception:
            raise refused from None
        return []


def _is_openclip(name: str) -> bool:
    """Whether a name that brings its own weights is of open_clip: a hub id, or a local folder."""
    return name.startswith(HUB) or (Path(name) / CONFIG_FILE).is_file()


def with_weights(clip: Clip, pretrained: str) -> Clip:
    """A loaded model with the weights of a local checkpoint instead, as a run that fine-tuned it left them.

    Raises:
        ModelError: the checkpoint is damaged or of another model.
    """
    notes = _put(clip.model, Path(pretrained), clip.source.name)
    return replace(clip, source=Source(clip.source.name, pretrained), notes=(*clip.notes, *notes))


def _check_name(name: str, model_name: str, pretrained: str) -> None:
    """Refuse what open_clip would refuse, before it builds anything, with the nearest names."""
    import open_clip

    check_known(name)
    if pretrained == RANDOM_WEIGHTS or file_exists(pretrained):
        return
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    listed = ", ".join(tags[:6]) + (", …" if len(tags) > 6 else "")
    if not pretrained:
        raise ModelError(
            f"model '{name}' needs weights: `pretrained` takes {f'a tag ({listed}), ' if tags else ''}"
            f"a local checkpoint, or '{RANDOM_WEIGHTS}' for random weights"
        )
    if Path(pretrained).suffix in CHECKPOINT_SUFFIXES:
        raise ModelError(f"`pretrained` {pretrained}: there is no such file")
    if not open_clip.get_pretrained_cfg(model_name, pretrained):
        raise ModelError(
            f"model '{name}' has no pretrained tag '{pretrained}'{nearest(pretrained, tags)}; "
            f"known tags: {', '.join(tags) or 'none'}"
        )


def _check_checkpoint(path: Path, pretrained: str) -> None:
    if not pretrained:
        raise ModelError(
            f"model config {path} needs weights: `pretrained` takes a local checkpoint, "
            f"or '{RANDOM_WEIGHTS}' for random weights"
        )
    if not file_exists(pretrained):
        raise ModelError(f"`pretrained` {pretrained}: there is no such file, and a JSON config has no tags")


def _tokenizer(text: Mapping[str, Any], folder: Path | None, name: str = "") -> Any:
    """The tokenizer that a checked text configuration asks for, as open_clip picks it; its code is never run.

    `folder` is where the files of one of transformers lie; None for the place that the configuration names.
    """
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    kwargs = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    if source := text.get("hf_tokenizer_name"):
        mode = text.get("tokenizer_mode")
        made = HFTokenizer(str(folder or source), tokenizer_mode=mode, trust_remote_code=False, **kwargs)
        if language := kwargs.get("language"):
            # transformers 5 goes back to its own setting at every call, past open_clip's.
            made.tokenizer.src_lang = language
        return made
    if "siglip" in name.lower():
        return open_clip.get_tokenizer(name)
    kwargs.pop("strip_sep_token", None)
    return SimpleTokenizer(**kwargs)


def _clip(
    model: nn.Module, inner: Any, evaluate: Any, train: Any, source: Source, notes: Sequence[str] = ()
) -> Clip:
    family = family_of(model)
    check_padding(
        getattr(getattr(model, "text", None), "config", None), getattr(inner, "tokenizer", None), source.name
    )
    # A text tower of transformers takes more tokens than its tokenizer is to produce.
    length = getattr(inner, "context_length", None) or family.context_length(model)
    tokenizer = OpenClipTokenizer(inner, length)
    check_preprocess(evaluate, (3, *family.image_size(model)), source.name)
    told = (*notes, *_language_note(inner, source.name))
    return Clip(model, family, tokenizer, evaluate, train, source, told)


def _language_note(inner: Any, name: str) -> list[str]:
    """Say in which language every text begins, where a tokenizer has one as NLLB's has."""
    tokenizer: Any = getattr(inner, "tokenizer", None)
    if not hasattr(tokenizer, "src_lang"):
        return []
    first = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[0]
    return [
        f"{name}: every text begins with the language {first}; for another one set "
        'clip.tokenizer.inner.tokenizer.src_lang = "vie_Latn", or load a JSON model config that has '
        '"language": "vie_Latn" in its text_cfg.tokenizer_kwargs'
    ]
