"""PEFT 0.21's files for LoRA on `transformers.CLIPModel`: tensor names, shapes, `adapter_config.json`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.checkpoint import number, rank, shown, some
from clipgraft.adapters.patterns import Matches, PatternError, end_of_path, targeted
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site

_PREFIX = "base_model.model."
_BARE = ("encoder.", "embeddings.", "final_layer_norm.", "post_layernorm.", "pre_layrnorm.")
_TEXT, _VISION = "text_model.", "vision_model."
_TOWER_CLASSES = {
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "CLIPTextTransformer": _TEXT,
    "CLIPVisionModel": _VISION,
    "CLIPVisionModelWithProjection": _VISION,
    "CLIPVisionTransformer": _VISION,
    "CLIPForImageClassification": _VISION,
}
# Modules that one tower has and the other has not.
_OWN_MODULES = {
    _TEXT: ("embeddings.token_embedding.", "final_layer_norm."),
    _VISION: (
        "embeddings.patch_embedding.",
        "embeddings.class_embedding",
        "post_layernorm.",
        "pre_layrnorm.",
    ),
}
_EMBEDDINGS = ("token_embedding", "position_embedding")
_NAME = re.compile(
    r"(?P<path>.+?)\.(?:lora_embedding_(?P<table>[AB])|lora_(?P<part>[AB])\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|lora_B\.(?P<offset>bias)"
    r"|(?:base_layer\.)?(?P<own>weight|bias))"
)


@dataclass(frozen=True)
class Tensors:
    """What `adapter_model.safetensors` holds, by what it is for.

    Attributes:
        weights: A and B by site.
        magnitudes: (out,) of DoRA by site.
        offsets: (out,) by site, biases of B, which the scale acts on.
        biases: (out,) whole biases by the path of their module.
        full: whole weights, (out, in), of modules that were saved as they are.
    """

    weights: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    magnitudes: dict[Site, Tensor] = field(default_factory=dict)
    offsets: dict[Site, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    full: dict[Site, Tensor] = field(default_factory=dict)


def name_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """`adapter_model.safetensors`: the same under PEFT's names; offsets and whole weights are not written."""
    named: dict[str, Tensor] = {}
    for site, pair in tensors.weights.items():
        stem = f"{_PREFIX}{site_path(site)}"
        table = site.role in _EMBEDDINGS
        for part, tensor in zip("AB", pair, strict=True):
            named[f"{stem}.lora_embedding_{part}" if table else f"{stem}.lora_{part}.weight"] = tensor
    for site, magnitude in tensors.magnitudes.items():
        shaped = magnitude.view(1, -1, 1, 1) if site.role == "patch_embedding" else magnitude
        named[f"{_PREFIX}{site_path(site)}.lora_magnitude_vector"] = shaped
    adapted = {site_path(site) for site in tensors.weights}
    for path, bias in tensors.biases.items():
        named[f"{_PREFIX}{path}.{'base_layer.' if path in adapted else ''}bias"] = bias
    return named


def tower_prefix(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> str:
    """What the module paths of one tower alone lack of those of `CLIPModel`; "" where they lack nothing.

    Since transformers 5 the modules of `CLIPTextModel` and `CLIPVisionModel` have no inner prefix, so that
    their adapters say `encoder.layers.0…`, and only the configuration tells whose.

    Raises:
        AdapterError: it does not tell.
    """
    names = [name.removeprefix(_PREFIX) for name in tensors]
    if not any(name.startswith(_BARE) for name in names):
        return ""
    auto = config.get("auto_mapping")
    kind = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    if kind in _TOWER_CLASSES:
        return _TOWER_CLASSES[kind]
    for prefix, own in _OWN_MODULES.items():
        if any(name.startswith(own) for name in names):
            return prefix
    raise AdapterError(
        f"{folder} is of one tower alone, and adapter_config.json does not say which: add to it "
        '"auto_mapping": {"base_model_class": "CLIPTextModel"} or "CLIPVisionModel", whichever it was made on'
    )


def read_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, prefix: str = ""
) -> tuple[Tensors, LoraConfig]:
    """What the file holds, by site, and the settings that scale it; `prefix` as `tower_prefix` says.

    Raises:
        AdapterError: the configuration is of something else than LoRA, names lie outside
            transformers.CLIPModel or are not what the configuration announces, one half of a pair is missing,
            or weights and configuration disagree.
    """
    check_config(config, folder)
    found, halves, surplus = Tensors(), dict[Site, dict[str, Tensor]](), []
    for name, tensor in tensors.items():
        bare = name.removeprefix(_PREFIX)
        bare = f"{prefix}{bare}" if prefix and bare.startswith(_BARE) else bare
        if not _sort(bare, tensor, config, found, halves):
            surplus.append(name)
    if surplus:
        _check_saved(surplus, config, folder)
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on transformers.CLIPModel, or that "
            f"adapter_config.json does not announce: {some([repr(name) for name in surplus])}; train it on "
            "that model, or drop them"
        )
    single = [str(site) for site, parts in halves.items() if set(parts) != {"A", "B"}]
    if single or not (halves or found.full):
        raise AdapterError(
            f"{folder} lacks A or B for {some(single) or 'every site'}: it is incomplete; save it again"
        )
    found.weights.update({site: (parts["A"], parts["B"]) for site, parts in halves.items()})
    _check_whole(found, config, folder)
    return found, read_settings(found.weights, config, folder, prefix)


def _check_saved(surplus: Sequence[str], config: Mapping[str, Any], folder: Path) -> None:
    """Say of whole modules that `modules_to_save` announces, such as layer norms, that they are not read."""
    kept = config.get("modules_to_save")
    kept = [name for name in kept if isinstance(name, str)] if isinstance(kept, list) else []
    paths = [name.removeprefix(_PREFIX).rpartition(".")[0] for name in surplus]
    saved = [path for path in paths if any(f".{path}.".find(f".{name}.") >= 0 for name in kept)]
    if saved:
        raise AdapterError(
            f"{folder} holds whole modules that its modules_to_save announces, {some(dict.fromkeys(saved))}: "
            "of those clipgraft reads linear layers and embeddings alone, and no layer norms; merge it "
            "with PEFT (merge_and_unload()) and use the model, or train it without them"
        )


def _sort(
    name: str,
    tensor: Tensor,
    config: Mapping[str, Any],
    found: Tensors,
    halves: dict[Site, dict[str, Tensor]],
) -> bool:
    """Put a tensor where it belongs; False if it belongs nowhere."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    path, site = match["path"], _site_or_none(match["path"])
    if match["own"] == "bias":
        found.biases[path] = tensor
        return bool(config.get("bias") not in (None, "none"))
    if site is None:
        return False
    if match["own"] == "weight":
        found.full[site] = tensor
        return any(f".{path}".endswith(f".{kept}") for kept in config.get("modules_to_save") or ())
    if match["magnitude"]:
        found.magnitudes[site] = tensor.flatten()
        return bool(config.get("use_dora"))
    if match["offset"]:
        found.offsets[site] = tensor
        return bool(config.get("lora_bias"))
    halves.setdefault(site, {})[match["table"] or match["part"]] = tensor
    return (site.role in _EMBEDDINGS) == bool(match["table"])


def _check_whole(found: Tensors, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse adapters that lack a part which their configuration announces; PEFT only warns."""
    lacking = [f"{site} (lora_magnitude_vector)" for site in found.weights if site not in found.magnitudes]
    lacking = lacking if config.get("use_dora") else []
    if config.get("lora_bias"):
        lacking += [f"{site} (lora_B.bias)" for site in found.weights if site not in found.offsets]
    stray = [str(site) for site in (*found.magnitudes, *found.offsets) if site not in found.weights]
    twice = [str(site) for site in found.full if site in found.weights]
    for sites, fault in (
        (lacking, "lacks weights of"),
        (stray, "has magnitudes or biases, but no A and B, for"),
        (twice, "has both a whole weight and an update for"),
    ):
        if sites:
            raise AdapterError(f"{folder} {fault} {some(sites)}: it is incomplete; save it again")


def _site_or_none(path: str) -> Site | None:
    try:
        return path_site(path)
    except AdapterError:
        return None


log = logging.getLogger("clipgraft")
_MOST_KEYS = 10_000
_CLIP_MODULE = "transformers.models.clip.modeling_clip"  # where AutoPeftModel looks for the base's class
_DEFAULT = 8  # PEFT's r and alpha, for configurations that do not say
# What makes an adapter compute something else than this package does.
_UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# What adapters of transformers.CLIPModel may use, and others may not.
_NOT_PLAIN = ("use_dora", "lora_bias", "modules_to_save")
# Initialisations that take the initial B·A off the base, so that A and B alone do not tell the update; of
# these only plain PiSSA can be computed again.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_json(settings: LoraConfig, sites: Iterable[Site], base_name: str) -> dict[str, Any]:
    """`adapter_config.json`: what stock PEFT needs to rebuild these very layers.

    The patterns of the settings are by `str(site)`.
    """
    known = list(sites)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "CLIPModel", "parent_library": _CLIP_MODULE},
        "base_model_name_or_path": base_name.removeprefix("hf:") or None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [site_path(site) for site in known],
        "rank_pattern": _by_path(settings.rank_pattern, known),
        "alpha_pattern": _by_path(settings.alpha_pattern, known),
    }


def _by_path(pattern: Mapping[str, Any], sites: Iterable[Site]) -> dict[str, Any]:
    return {_exactly(site): pattern[str(site)] for site in sites if str(site) in pattern}


def _exactly(site: Site) -> str:
    """PEFT reads pattern keys as regular expressions."""
    return re.escape(site_path(site))


def missing_sites(
    config: Mapping[str, Any], present: Iterable[Site], sites: Iterable[Site], prefix: str = ""
) -> list[Site]:
    """Sites of a model that the configuration targets and the weights lack, in the towers that they adapt.

    PEFT only warns of them. `prefix` is what PEFT's module paths lacked of those of `CLIPModel`. A pattern
    that is not matched here is passed over with a line that says so: the weights tell the sites without it.
    """
    there = set(present)
    towers = {site.tower for site in there}
    paths = {site_path(site).removeprefix(prefix): site for site in sites if site.tower in towers}
    try:
        return [site for path in targeted(config, paths) if (site := paths[path]) not in there]
    except PatternError as error:
        log.info("target_modules: whether the adapter is complete cannot be told: %s", error)
        return []


def named_base(config: Mapping[str, Any], family: str) -> dict[str, str]:
    """The base that PEFT recorded, as `load` takes it: a local folder as it is, anything else as a hub id."""
    name = config.get("base_model_name_or_path")
    name = name.strip() if isinstance(name, str) and "\0" not in name else ""
    if name and not Path(name).is_dir():
        name = f"hf:{name}" if family == "transformers" else ""
    return {"name": name, "pretrained": "", "family": family}


def check_config(config: Mapping[str, Any], folder: Path, *, plain: bool = False) -> None:
    """Refuse what computes otherwise than A, B and this package's options tell; raises AdapterError.

    With `plain` only W + s·B·A is taken.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder} is of PEFT type {shown(config.get('peft_type'))}: clipgraft reads 'LORA'"
        )
    used = [key for key in (*_UNSUPPORTED, *(_NOT_PLAIN if plain else ())) if config.get(key)]
    if config.get("bias") not in (None, "none") and (plain or config["bias"] not in ("lora_only", "all")):
        used.append(f"bias={shown(config['bias'])}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE) and (plain or start != "pissa"):
        used.append(f"init_lora_weights={shown(start)}")
    if used:
        raise AdapterError(
            f"{folder} uses {', '.join(used)}, which clipgraft does not read: make it plain LoRA with PEFT"
        )


class Rules:
    """Rank and alpha of every module by a configuration's own rules.

    Attributes:
        r: default rank.
        alpha: default alpha.
        dropout: probability on the adapter path.
        use_rslora: α/√r instead of α/r.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raises AdapterError for values that are no numbers, and for patterns that are none."""
        filled = {"r": _DEFAULT, "lora_alpha": _DEFAULT, "lora_dropout": 0.0}
        filled |= {key: value for key, value in config.items() if value is not None}
        self.r = rank(filled, folder)
        self.alpha = number(filled, "lora_alpha", folder)
        self.dropout = number(filled, "lora_dropout", folder)
        self.use_rslora = bool(config.get("use_rslora"))
        self._ranks = _pattern(config, "rank_pattern", folder)
        self._alphas = _pattern(config, "alpha_pattern", folder)

    def of(self, module: str) -> tuple[float, float]:
        """Rank and alpha of a module path without PEFT's prefix."""
        return _first(self._ranks, module, self.r), _first(self._alphas, module, self.alpha)


def read_settings(
    weights: Mapping[Site, tuple[Tensor, Tensor]], config: Mapping[str, Any], folder: Path, prefix: str = ""
) -> LoraConfig:
    """The settings that scale A and B; raises AdapterError if they do not fit them.

    `prefix` is what PEFT's module paths lacked of those of `CLIPModel`.
    """
    rules = Rules(config, folder)
    found = {site: rules.of(site_path(site).removeprefix(prefix)) for site in weights}
    ranks, alphas = ({site: rule[part] for site, rule in found.items()} for part in (0, 1))
    _check_ranks(ranks, folder)
    for site, (a, b) in weights.items():
        if a.ndim < 2 or b.ndim < 2 or not a.shape[0] == b.shape[1] == ranks[site]:
            raise AdapterError(
                f"{folder}: {site} has A {tuple(a.shape)}, B {tuple(b.shape)} where the configuration says "
                f"rank {ranks[site]}: the files are of two adapters; copy them together again"
            )
    return LoraConfig(
        r=rules.r,
        alpha=rules.alpha,
        dropout=rules.dropout,
        targets=",".join(map(str, weights)),
        use_rslora=rules.use_rslora,
        rank_pattern={str(site): int(r) for site, r in ranks.items() if r != rules.r},
        alpha_pattern={str(site): a for site, a in alphas.items() if a != rules.alpha},
        use_dora=bool(config.get("use_dora")),
        bias="lora_only" if config.get("lora_bias") else config.get("bias") or "none",
    )


def _check_ranks(ranks: Mapping[Site, float], folder: Path) -> None:
    if odd := [rank for rank in ranks.values() if rank != int(rank)]:
        raise AdapterError(f"{folder}: rank_pattern says {odd[0]!r}, no whole number: save the adapter again")


def _pattern(config: Mapping[str, Any], key: str, folder: Path) -> list[tuple[Matches, float]]:
    """A rank or alpha pattern whose keys are regular expressions and whose values are numbers."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(isinstance(name, str) for name in pattern):
        raise AdapterError(f"{folder}: {key} is no JSON object: save the adapter again")
    if len(pattern) > _MOST_KEYS:
        raise AdapterError(
            f"{folder}: {key} has {len(pattern):,} keys, more than a model has modules: save it again"
        )
    rules: list[tuple[Matches, float]] = []
    for expression in pattern:
        try:
            matches = end_of_path(expression)
        except PatternError as error:
            raise AdapterError(
                f"{folder / 'adapter_config.json'}: {key} key {shown(expression)} is not matched: {error}; "
                "name the modules by their paths, or by a plain expression such as layers\\.[0-3]\\..*q_proj"
            ) from error
        rules.append((matches, number(pattern, expression, folder)))
    return rules


def _first(rules: list[tuple[Matches, float]], module: str, default: float) -> float:
    """PEFT's own rule: the first pattern key that matches the end of the module path."""
    return next((value for matches, value in rules if matches(module)), default)
