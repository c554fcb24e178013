"""Loading with transformers: a hub id or a local folder of a `CLIPModel` or of its relatives (`CLASSES`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.files import folder_exists
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.configs import transformers_config
from clipgraft.models.hub import hf_failure, hub_access, tell_fetch
from clipgraft.models.library_calls import no_initialization
from clipgraft.models.mapped_weights import OpenedFile
from clipgraft.models.names import SIGLIP2
from clipgraft.models.padding import check_padding
from clipgraft.models.processors import HfPreprocess, HfTokenizer, check_preprocess
from clipgraft.models.siglip import packed_shape
from clipgraft.models.state_dict import MisfitError, load_weights
from clipgraft.models.vision_text import MODEL_TYPES
from clipgraft.models.weights_file import UnreadableError, WeightsFile, read_weights
from clipgraft.readers import placeholder

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CLASSES = {  # of transformers, by model_type
    "clip": "CLIP",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "altclip": "AltCLIP",
    "chinese_clip": "ChineseCLIP",
    "vision-text-dual-encoder": "VisionTextDualEncoder",
}
_SHARDS = (".safetensors", ".bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def load_hf(path: str, name: str) -> Clip:
    """A model of transformers with its tokenizer and image processor; its own code is never run.

    Raises:
        ModelError: it cannot be fetched or read, is no CLIP model, or comes without some of its parts.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig

    check_path(path)
    with hub_access(needed=not folder_exists(path)) as offline:
        try:
            _check_downloaded(path)
            values, _ = PreTrainedConfig.get_config_dict(path)
            _check_model_type(path, values.get("model_type"))
            kind = CLASSES[values["model_type"]]
            config = transformers_config(getattr(transformers, f"{kind}Config"), values, path)
            build = getattr(transformers, f"{kind}Model")
            _check_head(path, config)
            config.name_or_path = path  # the model copies it when it is made
            of_others = values["model_type"] in MODEL_TYPES
            model, notes = (
                _built_by_transformers(build, config, path) if of_others else _built(build, config, path)
            )
            _check_parts(path)
            inner = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
            _check_vocabulary(path, inner, config.text_config.vocab_size)
            if of_others:
                check_padding(config.text_config, inner, path)
            family = family_of(model)
            preprocess = HfPreprocess(processor)
            check_preprocess(preprocess, _image_shape(model, processor), path)
        except ModelError:
            raise
        except Exception as error:
            raise hf_failure(path, error, offline) from error
    tokenizer = HfTokenizer(inner, family.context_length(model))
    return Clip(model, family, tokenizer, preprocess, None, Source(name), tuple(notes))


def _built(build: Any, config: Any, path: str) -> tuple[nn.Module, list[str]]:
    """A model with the weights of a folder or hub id, and what the user is to know of these."""
    weights, notes = _read(path)
    with no_initialization(), torch.device("meta"):
        # A configuration that lost settings is of another size: found out before that is built.
        _put(build(config), weights, path)
    with no_initialization():
        model = build(config)
    return model, notes + _put(model, weights, path)


def _built_by_transformers(build: Any, config: Any, path: str) -> tuple[nn.Module, list[str]]:
    """The same, of towers whose weights have other names in files, which transformers alone knows.

    Raises:
        ModelError: weights are missing, left over, or of another shape.
    """
    _weight_files(path)
    model, found = build.from_pretrained(
        path, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ModelError(
            f"{path} holds weights that do not fit its config.json ({told}): fetch the model again"
        )
    return model.eval(), []


def _read(path: str) -> tuple[WeightsFile, list[str]]:
    """The weights of a folder or hub id, and what the user is to know of their files."""
    notes: list[str] = []
    merged: dict[str, Tensor] = {}
    opened: list[OpenedFile] = []
    files = _weight_files(path)
    try:
        for file in files:
            read = read_weights(file)
            notes += [f"{file}: {note}" for note in read.notes]
            merged |= read.state
            opened += read.opened
    except UnreadableError as error:
        raise ModelError(
            f"{file} cannot be read as weights of a transformers CLIP folder: {error}"
        ) from error
    return WeightsFile(files[0], merged, opened=tuple(opened)), notes


def _put(model: nn.Module, weights: WeightsFile, path: str) -> list[str]:
    """Give a model its weights; returns what the user is to know of them."""
    try:
        return [f"{path}: {note}" for note in load_weights(model, weights)]
    except MisfitError as error:
        raise ModelError(
            f"{weights.path} cannot be read as weights of {path}: {error}; fetch or save the model again"
        ) from error


def _weight_files(path: str) -> list[Path]:
    """The files of weights of a folder or hub id, one or its shards, fetched if need be."""
    for name in _WEIGHTS:
        found = _file_of(path, name)
        if found is None:
            continue
        if found.suffix != ".json":
            return [found]
        index = json.loads(found.read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        if odd := [
            shard for shard in shards if Path(str(shard)).name != shard or Path(shard).suffix not in _SHARDS
        ]:
            raise ModelError(f"{found} names shards outside its folder, {odd[0]!r}: fetch the model again")
        return [shard for name in shards if (shard := _file_of(path, name, required=True)) is not None]
    where = "that folder" if folder_exists(path) else "that repository"
    raise ModelError(
        f"{path} cannot be read as a transformers CLIP folder: {where} holds no weights "
        f"({', '.join(_WEIGHTS)})"
    )


def _file_of(path: str, name: str, required: bool = False) -> Path | None:
    """A file of a folder or hub id, fetched if need be; None where it is not there."""
    from transformers.utils import cached_file

    if Path(name).suffix in _SHARDS and not folder_exists(path):
        tell_fetch(path, [name])
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=required)
    return None if found is None else Path(found)


def _check_downloaded(path: str) -> None:
    """Refuse a local folder in which a download tool left something else in place of a file."""
    for name in ("config.json", *_TOKENIZER_FILES, *_PROCESSORS):
        if problem := placeholder(Path(path) / name):
            raise ModelError(f"{Path(path) / name} cannot be read: {problem}")


def _check_parts(path: str) -> None:
    """Say which files of a local folder are missing: a model saved alone lacks tokenizer and processor."""
    folder = Path(path)
    if not folder.is_dir():
        return
    tokenizer = (
        ("tokenizer.json",),
        ("vocab.json", "merges.txt"),
        ("spiece.model",),
        ("sentencepiece.bpe.model",),  # XLM-R
        ("vocab.txt",),  # BERT
    )
    missing = []
    if not any(all((folder / name).is_file() for name in names) for names in tokenizer):
        missing.append("tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    if not any((folder / name).is_file() for name in _PROCESSORS):
        missing.append(f"image processor ({_PROCESSORS[0]})")
    if missing:
        raise ModelError(
            f"{path} has no {' and no '.join(missing)}: the model was saved alone; copy the missing files "
            "from the model that it was made of, or save them beside it with "
            "CLIPProcessor.from_pretrained(ITS_BASE).save_pretrained(FOLDER)"
        )


def check_path(path: str) -> None:
    """Refuse what is neither a folder with a model in it nor written like a hub id."""
    if not path:
        raise ModelError("'hf:' names no model: write hf:owner/name, or hf: and a local folder")
    if folder_exists(path):
        if not (Path(path) / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: it is no transformers model folder")
    elif path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1:
        raise ModelError(f"{path}: there is no such folder (hub ids are written owner/name)")


def _check_model_type(path: str, kind: object) -> None:
    if kind is None and not folder_exists(path):
        raise ModelError(f"hf:{path} has no config.json: if it holds an open_clip model, load hf-hub:{path}")
    # transformers would load another type's weights where names agree and draw the rest at random.
    if kind not in CLASSES:
        raise ModelError(
            f"{path} holds a {str(kind)[:100]!r} model: clipgraft loads transformers models of type "
            f"{', '.join(map(repr, CLASSES))}"
        )


def _check_head(path: str, config: Any) -> None:
    """Refuse a SigLIP whose vision tower gives no features."""
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ModelError(
            f"{path}: vision_config.vision_use_head is false, so that images have no features; take the "
            "model with its pooling head"
        )


def _image_shape(model: nn.Module, processor: Any) -> tuple[int, ...]:
    """What the image processor of a model is to give for one image."""
    family = family_of(model)
    if family.twin(model) is SIGLIP2:
        return packed_shape(model, int(processor.max_num_patches))
    return 3, *family.image_size(model)


def _check_vocabulary(path: str, inner: Any, rows: int) -> None:
    """Refuse a tokenizer that does not fit the model; without its files transformers makes an empty one."""
    ids = set(inner.get_vocab().values())
    if ids <= set(inner.all_special_ids):
        raise ModelError(f"{path} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is missing")
    if max(ids) >= rows:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {max(ids)} but the model only {rows} token embeddings; "
            "they are not of one model"
        )
