"""LoRA of a CLIP text encoder as trainers of image generators save it: kohya's scripts and diffusers.

Both write one `.safetensors` file for the image generator and its text encoders. The part of the text encoder
is an adapter of CLIP's text tower and is read; what belongs to the generator is left out and said. kohya:
`lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight`, `.lora_up.weight` and `.alpha` (scale
α/r; r where there is no alpha). diffusers: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj` with
`.lora_A.weight` and `.lora_B.weight`, or `.lora_linear_layer.down.weight`, and alphas in the file's metadata.
Where a generator has two text encoders, the depth of the model at hand decides, as only one of them fits.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, parts_of
from clipgraft.adapters.checkpoint import AGAIN, as_record, as_weight, lora_config, paired, some
from clipgraft.errors import AdapterError
from clipgraft.models.names import path_site
from clipgraft.models.sites import Site
from clipgraft.models.weights_file import UnreadableError, read_weights
from clipgraft.records import Finite, parse_json

Trainer = Literal["kohya", "diffusers"]

log = logging.getLogger("clipgraft")
_KOHYA = re.compile(r"(?P<owner>lora_te\d?)_(?P<path>[a-z0-9_]+)\.(?P<rest>.+)")
_KOHYA_BLOCK = re.compile(
    r"(text_model_)?encoder_layers_(?P<block>\d{1,4})_(?P<module>self_attn_[a-z]+_proj|mlp_fc[12])"
)
_DIFFUSERS = re.compile(r"(?P<owner>text_encoder(_\d)?)\.(?P<path>.+?)\.(?P<rest>lora.*|alpha|dora_scale)")
_GENERATOR = ("lora_unet_", "unet.", "transformer.", "lora_transformer_")
_PARTS = {
    "lora_down.weight": "A",
    "lora_A.weight": "A",
    "lora_linear_layer.down.weight": "A",
    "lora.down.weight": "A",
    "lora_up.weight": "B",
    "lora_B.weight": "B",
    "lora_linear_layer.up.weight": "B",
    "lora.up.weight": "B",
    "alpha": "alpha",
}
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class _Encoder:
    """The weights of one text encoder: A, B and alpha by site, and names that are none of those."""

    halves: dict[Site, dict[str, Tensor]]
    surplus: list[str]

    @property
    def depth(self) -> int:
        return 1 + max((site.block or 0 for site in self.halves), default=-1)


def trainer_of(path: Path) -> Trainer:
    """Which trainer wrote a file; raises AdapterError for a file of neither."""
    return _trainer(_open(path)[0], path)


def _trainer(names: Mapping[str, object], path: Path) -> Trainer:
    if any(name.startswith(("lora_te", "lora_unet_")) for name in names):
        return "kohya"
    ours = [name for name in names if "lora" in name and name.startswith(("unet.", "text_encoder"))]
    if ours:
        return "diffusers"
    raise AdapterError(
        f"{path} is no adapter that clipgraft reads: its names ({some(list(names))}) are neither kohya's "
        "(lora_te_…) nor diffusers' (text_encoder.…); a PEFT adapter is the folder that holds it"
    )


def read_diffusion(path: Path, text_layers: int | None = None) -> AdapterFile:
    """Read the text encoder's part of a `.safetensors` file of kohya or diffusers.

    Args:
        path: the file.
        text_layers: blocks of the text tower at hand, where the file has several text encoders.

    Raises:
        AdapterError: it is of neither, has no text encoder's weights, or other weights than plain LoRA.
    """
    tensors, metadata = _open(path)
    trainer = _trainer(tensors, path)
    encoders, generator = _encoders(tensors, path)
    if not encoders:
        raise AdapterError(
            f"{path} is a LoRA of {trainer} for an image generator alone: it has no weights of a CLIP text "
            "encoder (lora_te_…, text_encoder.…); train it with the text encoder, or use it where it belongs"
        )
    owner = _chosen(encoders, text_layers, path)
    encoder = encoders[owner]
    if encoder.surplus:
        raise AdapterError(
            f"{path} is a LoRA of {trainer} with weights that are no plain LoRA of CLIP's text tower: "
            f"{some(encoder.surplus)}; save it as plain LoRA of linear layers"
        )
    others = sum(1 for name in tensors if not name.startswith((f"{owner}_", f"{owner}.")))
    if others:
        log.info(
            "%s: took the %d weights of %s; left out %d, %s",
            path,
            len(tensors) - others,
            owner,
            others,
            "of the image generator" if generator == others else "of other parts",
        )
    return _adapter(path, encoder, _alphas(encoder, metadata, owner, path))


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    if not path.is_file():
        raise AdapterError(f"no adapter at {path}: there is no such file; check the path")
    try:
        tensors = read_weights(path).state
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except UnreadableError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise AdapterError(f"{path} is truncated or damaged: copy or save it again") from error
    return tensors, metadata


def _encoders(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, _Encoder], int]:
    """The text encoders by what the file calls them, and how many weights are the generator's."""
    found: dict[str, _Encoder] = {}
    generator = 0
    for name, tensor in tensors.items():
        match = _KOHYA.fullmatch(name) or _DIFFUSERS.fullmatch(name)
        if match is None:
            generator += name.startswith(_GENERATOR)
            continue
        encoder = found.setdefault(match["owner"], _Encoder({}, []))
        site = _site(match["path"])
        part = _PARTS.get(match["rest"])
        if site is None or part is None:
            encoder.surplus.append(name)
            continue
        ndim = tensor.ndim if part == "alpha" else 2
        encoder.halves.setdefault(site, {})[part] = as_weight(tensor, name, path, ndim)
    return found, generator


def _site(path: str) -> Site | None:
    """The site of a module as kohya or diffusers calls it."""
    block = _KOHYA_BLOCK.fullmatch(path)
    if block is not None:
        module = block["module"].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
        path = f"text_model.encoder.layers.{int(block['block'])}.{module}"
    elif path.startswith(("encoder.", "embeddings.")):
        path = f"text_model.{path}"  # CLIPTextModel of transformers 5
    try:
        site = path_site(path)
    except AdapterError:
        return None
    return (
        site if site.tower == "text" and site.role not in ("token_embedding", "position_embedding") else None
    )


def _chosen(encoders: Mapping[str, _Encoder], text_layers: int | None, path: Path) -> str:
    if len(encoders) == 1:
        return next(iter(encoders))
    fitting = [owner for owner, encoder in encoders.items() if encoder.depth == text_layers]
    if len(fitting) == 1:
        return fitting[0]
    depths = ", ".join(f"{owner} of {encoder.depth} blocks" for owner, encoder in encoders.items())
    raise AdapterError(f"{path} holds LoRA of several text encoders, {depths}: say which with `text_layers`")


def _alphas(encoder: _Encoder, metadata: Mapping[str, str], owner: str, path: Path) -> dict[Site, float]:
    """The alpha of every site: its own tensor, else what the metadata says, else the rank."""
    told = _told(metadata, owner, path)
    alphas: dict[Site, float] = {}
    guessed = 0
    for site, parts in encoder.halves.items():
        own = parts.pop("alpha", None)
        if own is not None and own.numel() != 1:
            raise AdapterError(f"{path}: the alpha of {site} is no number: save it again")
        value = told.lora_alpha if own is None else float(own)
        if not value:  # kohya takes 0 for the rank too
            guessed += 1
            value = float(parts["A"].shape[0]) if "A" in parts else 1.0
        alphas[site] = value
    if guessed:
        log.info("%s: %d sites have no alpha: the rank is taken, so that they act once", path, guessed)
    return alphas


@dataclass(frozen=True)
class _Told:
    """What diffusers keeps in a file's metadata of one text encoder, as far as it matters here."""

    lora_alpha: Finite | None = None
    use_dora: Any = None
    use_rslora: Any = None
    alpha_pattern: Any = None
    lora_bias: Any = None


def _told(metadata: Mapping[str, str], owner: str, path: Path) -> _Told:
    where = f"{path}: its {_METADATA}"
    whole = parse_json(metadata.get(_METADATA, "{}"), dict[str, Any], where, AdapterError, AGAIN)
    prefix = f"{owner}."
    own = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
    told = as_record(own, _Told, where)
    if used := [k for k in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if getattr(told, k)]:
        raise AdapterError(
            f"{path}: its metadata says {', '.join(used)}, which is not read from such files: save plain LoRA"
        )
    return told


def _adapter(path: Path, encoder: _Encoder, alphas: Mapping[Site, float]) -> AdapterFile:
    weights = dict(sorted(paired(encoder.halves, path).items(), key=lambda item: item[0].order))
    ranks = {site: a.shape[0] for site, (a, _) in weights.items()}
    alphas = {site: alphas[site] for site in weights}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = lora_config(path, int(r), alpha, ranks, alphas, dropout=0.0)
    base = {"name": "", "pretrained": "", "family": "transformers"}
    return AdapterFile(path, parts_of(weights), settings, base=base)
