"""PEFT 0.21's files for LoRA on `transformers.CLIPModel`: tensor names, shapes, `adapter_config.json`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.checkpoint import lora_config, some
from clipgraft.adapters.patterns import Matches, PatternError, end_of_path, targeted
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.layers import LoraLayer, Parts
from clipgraft.lora.variants import PlainLora, variant_in_peft, variant_of
from clipgraft.models.hf import path_site, site_path
from clipgraft.models.sites import Site
from clipgraft.records import shown

_PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."
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


@dataclass(frozen=True)
class Tensors:
    """What `adapter_model.safetensors` holds, by what it is for.

    Attributes:
        parts: what the variant stores, by site and attribute name.
        shared: what the variant stores for all sites together, by name.
        offsets: (out,) by site, biases of B, which the scale acts on.
        biases: (out,) whole biases by the path of their module.
        full: whole weights, (out, in), of modules that were saved as they are.
    """

    parts: dict[Site, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[Site, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    full: dict[Site, Tensor] = field(default_factory=dict)


def name_tensors(tensors: Tensors, kind: type[LoraLayer]) -> dict[str, Tensor]:
    """`adapter_model.safetensors`: the same under PEFT's names; offsets and whole weights are not written."""
    named: dict[str, Tensor] = {}
    for site, parts in tensors.parts.items():
        for name, suffix in kind.peft_names(site).items():
            named[f"{_PREFIX}{site_path(site)}.{suffix}"] = kind.as_peft(name, parts[name], site)
    for name, tensor in tensors.shared.items():
        named[f"{_SHARED_PREFIX}{kind.peft_shared_names[name]}"] = tensor
    adapted = {site_path(site) for site in tensors.parts}
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
    kind, config = read_variant(config, folder)
    found, surplus = Tensors(), []
    for name, tensor in tensors.items():
        shared = name.removeprefix(_SHARED_PREFIX)
        if shared in kind.peft_shared_names.values():
            found.shared[next(own for own, peft in kind.peft_shared_names.items() if peft == shared)] = tensor
            continue
        bare = name.removeprefix(_PREFIX)
        bare = f"{prefix}{bare}" if prefix and bare.startswith(_BARE) else bare
        if not _sort(bare, tensor, kind, config, found):
            surplus.append(name)
    if surplus:
        _check_saved(surplus, config, folder)
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on transformers.CLIPModel, or that "
            f"adapter_config.json does not announce: {some([repr(name) for name in surplus])}; train it on "
            "that model, or drop them"
        )
    if not (found.parts or found.full):
        raise AdapterError(f"{folder} lacks the weights of every site: it is incomplete; save it again")
    _check_whole(found, kind, config, folder)
    return found, read_settings(kind, found.parts, config, folder, prefix)


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
    name: str, tensor: Tensor, kind: type[LoraLayer], config: Mapping[str, Any], found: Tensors
) -> bool:
    """Put a tensor where it belongs; False if it belongs nowhere."""
    for dots in (1, 2):  # q_proj.bias, q_proj.lora_A.weight
        path, *rest = name.rsplit(".", dots)
        suffix, site = ".".join(rest), _site_or_none(path)
        own = suffix.removeprefix("base_layer.")
        if (
            own == "bias"
            and (site is not None or dots == 1)
            and not path.endswith((".base_layer", ".lora_B"))
        ):
            found.biases[path] = tensor
            return bool(config.get("bias") not in (None, "none"))
        if site is None:
            continue
        if own == "weight":
            found.full[site] = tensor
            return any(f".{path}".endswith(f".{kept}") for kept in config.get("modules_to_save") or ())
        if suffix == "lora_B.bias":
            found.offsets[site] = tensor
            return bool(config.get("lora_bias"))
        # Older versions of PEFT write vectors as the weight of a module.
        names = {peft: part for part, peft in kind.peft_names(site).items()}
        part = names.get(suffix) or names.get(suffix.removesuffix(".weight"))
        if part is not None:
            found.parts.setdefault(site, {})[part] = kind.from_peft(part, tensor)
            return True
    return False


def _check_whole(found: Tensors, kind: type[LoraLayer], config: Mapping[str, Any], folder: Path) -> None:
    """Refuse adapters that lack a part which their configuration announces; PEFT only warns."""
    lacking = [
        f"{site} ({suffix})"
        for site, parts in found.parts.items()
        for part, suffix in kind.peft_names(site).items()
        if part not in parts
    ]
    if config.get("lora_bias"):
        lacking += [f"{site} (lora_B.bias)" for site in found.parts if site not in found.offsets]
    stray = [str(site) for site in found.offsets if site not in found.parts]
    twice = [str(site) for site in found.full if site in found.parts]
    for sites, fault in (
        (lacking, "lacks weights of"),
        (stray, "has biases of B, but no A and B, for"),
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
_HUGE = 10**15
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
    own = variant_of(settings).peft_config(settings)
    patterns: dict[str, Any] = {
        key: _by_path(own[key], known) for key in ("rank_pattern", "alpha_pattern") if key in own
    }
    return {
        **own,
        **patterns,
        "task_type": None,
        "auto_mapping": {"base_model_class": "CLIPModel", "parent_library": _CLIP_MODULE},
        "base_model_name_or_path": base_name.removeprefix("hf:") or None,
        "inference_mode": True,
        "target_modules": [site_path(site) for site in known],
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


def read_variant(
    config: Mapping[str, Any], folder: Path, *, plain: bool = False
) -> tuple[type[LoraLayer], dict[str, Any]]:
    """The variant of an adapter, and its configuration in the keys of PEFT's LoRA.

    Raises:
        AdapterError: PEFT computes something else with it than the variant and this package's options tell;
            with `plain`, something else than W + s·B·A.
    """
    try:
        kind, config = variant_in_peft(config)
    except AdapterError as error:
        raise AdapterError(f"{folder} is of PEFT type {shown(config.get('peft_type'))}: {error}") from error
    used = [key for key in (*_UNSUPPORTED, *(_NOT_PLAIN if plain else ())) if config.get(key)]
    if not issubclass(kind, PlainLora):
        used += [key for key in ("modules_to_save", "lora_bias") if config.get(key)]
        used += [f"peft_type={shown(config['peft_type'])}"] if plain else []
    if config.get("bias") not in (None, "none") and (plain or config["bias"] not in ("lora_only", "all")):
        used.append(f"bias={shown(config['bias'])}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE) and (plain or start != "pissa"):
        used.append(f"init_lora_weights={shown(start)}")
    if used:
        raise AdapterError(
            f"{folder} uses {', '.join(used)}, which clipgraft does not read: make it plain LoRA with PEFT"
        )
    return kind, config


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
        self.r = _rank(filled, folder)
        self.alpha = _number(filled, "lora_alpha", folder)
        self.dropout = _number(filled, "lora_dropout", folder)
        self.use_rslora = bool(config.get("use_rslora"))
        self._ranks = _pattern(config, "rank_pattern", folder)
        self._alphas = _pattern(config, "alpha_pattern", folder)

    def of(self, module: str) -> tuple[float, float]:
        """Rank and alpha of a module path without PEFT's prefix."""
        return _first(self._ranks, module, self.r), _first(self._alphas, module, self.alpha)


def read_settings(
    kind: type[LoraLayer],
    parts: Mapping[Site, Parts],
    config: Mapping[str, Any],
    folder: Path,
    prefix: str = "",
) -> LoraConfig:
    """The settings that scale stored tensors; raises AdapterError if they do not fit them.

    `config` is in the keys of PEFT's LoRA, and `prefix` is what PEFT's module paths lacked of those of
    `CLIPModel`.
    """
    rules = Rules(config, folder)
    found = {site: rules.of(site_path(site).removeprefix(prefix)) for site in parts}
    ranks, alphas = ({site: rule[part] for site, rule in found.items()} for part in (0, 1))
    _check_ranks(ranks, folder)
    for site, own in parts.items():
        if kind.rank_of(own) != ranks[site]:
            raise AdapterError(
                f"{folder}: {site} has {told_shapes(own)} where the configuration says "
                f"rank {ranks[site]}: the files are of two adapters; copy them together again"
            )
    return lora_config(
        folder,
        r=rules.r,
        alpha=rules.alpha,
        dropout=rules.dropout,
        targets=",".join(map(str, parts)),
        use_rslora=rules.use_rslora,
        rank_pattern={str(site): int(r) for site, r in ranks.items() if r != rules.r},
        alpha_pattern={str(site): a for site, a in alphas.items() if a != rules.alpha},
        variant=kind.variant,
        variant_options=config.get("variant_options") or {},
        bias="lora_only" if config.get("lora_bias") else config.get("bias") or "none",
    )


def told_shapes(parts: Parts) -> str:
    """The shapes of stored tensors for a message."""
    return ", ".join(f"{name.removeprefix('lora_')} {tuple(t.shape)}" for name, t in parts.items())


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
        rules.append((matches, _number(pattern, expression, folder)))
    return rules


def _first(rules: list[tuple[Matches, float]], module: str, default: float) -> float:
    """PEFT's own rule: the first pattern key that matches the end of the module path."""
    return next((value for matches, value in rules if matches(module)), default)


def _number(config: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """A finite number of a configuration; raises AdapterError where it is missing or something else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise AdapterError(
            f"{path}: {key!r} is {shown(value)} where a number belongs: save the adapter again"
        )
    return value


def _rank(config: Mapping[str, Any], path: Path) -> int:
    """`r` of a configuration; raises AdapterError unless it is a whole number from 1 up."""
    value = _number(config, "r", path)
    if value != int(value) or value < 1:
        raise AdapterError(f"{path}: rank {value!r} is no whole number from 1 up: save the adapter again")
    return int(value)
