"""PEFT 0.21's files for LoRA on `transformers.CLIPModel` and its relatives: names, shapes, configuration.

PEFT would open an adapter of sites that it has no module for, and leave those out with no more than a
warning, so that such adapters announce a type of their own, which it refuses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.checkpoint import as_record, lora_config, some
from clipgraft.adapters.patterns import Matches, PatternError, end_of_path, targeted
from clipgraft.errors import AdapterError
from clipgraft.files import folder_exists
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.layers import LoraLayer, Parts
from clipgraft.lora.variants import PlainLora, variant_in_peft, variant_of
from clipgraft.models.names import CLIP, SIGLIP, SIGLIP2, TWINS, Twin, is_module_of, path_site, site_path
from clipgraft.models.sites import Site
from clipgraft.records import Finite, Flag, Rank, shown

log = logging.getLogger("clipgraft")
T = TypeVar("T")
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."
_BARE = ("encoder.", "embeddings.", "head.", "final_layer_norm.", "post_layernorm.", "pre_layrnorm.")
_TEXT, _VISION = "text_model.", "vision_model."
_TOWER_CLASSES = {
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "CLIPTextTransformer": _TEXT,
    "CLIPVisionModel": _VISION,
    "CLIPVisionModelWithProjection": _VISION,
    "CLIPVisionTransformer": _VISION,
    "CLIPForImageClassification": _VISION,
    "SiglipTextModel": _TEXT,
    "SiglipVisionModel": _VISION,
    "SiglipForImageClassification": _VISION,
    "Siglip2TextModel": _TEXT,
    "Siglip2VisionModel": _VISION,
    "Siglip2ForImageClassification": _VISION,
}
_KNOWN = {*TWINS, *_TOWER_CLASSES}
# Modules that one tower has and the other has not.
_OWN_MODULES = {
    _TEXT: ("embeddings.token_embedding.", "final_layer_norm."),
    _VISION: (
        "embeddings.patch_embedding.",
        "embeddings.class_embedding",
        "post_layernorm.",
        "pre_layrnorm.",
        "head.mlp.",
        "head.attention.",
    ),
}


def name_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    """The content of `adapter_model.safetensors`; offsets and whole weights are not written."""
    kind, named = variant_of(adapter.settings), dict[str, Tensor]()
    for site, parts in adapter.parts.items():
        for name, suffix in kind.peft_names(site).items():
            named[f"{_PREFIX}{_saved_path(site, adapter)}.{suffix}"] = kind.as_peft(name, parts)
    for name, tensor in adapter.shared.items():
        named[f"{_SHARED_PREFIX}{kind.peft_shared_names[name]}"] = tensor
    adapted = {site_path(site, adapter.twin) for site in adapter.parts}
    for path, bias in adapter.biases.items():
        saved = adapter.twin.saved(path)
        named[f"{_PREFIX}{saved}.{'base_layer.' if path in adapted else ''}bias"] = bias
    return named


def _saved_path(site: Site, adapter: AdapterFile) -> str:
    return adapter.twin.saved(site_path(site, adapter.twin))


def is_in_names_of(tensors: Mapping[str, Tensor], twin: Twin) -> bool:
    """Whether all weights are LoRA at modules of a base that goes by its own names."""
    known = {f"{_PREFIX}{path}" for site, path in twin.paths.items() if site not in twin.foreign}
    return all(name.partition(".lora_")[0] in known for name in tensors)


def _told(twin: Twin) -> str:
    return twin.name if twin.paths else "transformers.CLIPModel"


def _class_of(config: Mapping[str, Any]) -> str:
    """The class of the base that PEFT recorded; empty where it did not."""
    auto = config.get("auto_mapping")
    return str(auto.get("base_model_class") or "") if isinstance(auto, Mapping) else ""


def _tower_prefix(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, known: Twin) -> str:
    """What the module paths of one tower alone lack of those of `CLIPModel`; "" where they lack nothing.

    Since transformers 5 the modules of `CLIPTextModel` and `CLIPVisionModel` have no inner prefix, so that
    their adapters say `encoder.layers.0…`, and only the configuration tells whose.

    Raises:
        AdapterError: it does not tell.
    """
    names = [name.removeprefix(_PREFIX) for name in tensors]
    if not any(name.startswith(_BARE) for name in names):
        return ""
    kind = _class_of(config)
    if kind in _TOWER_CLASSES:
        return _TOWER_CLASSES[kind]
    if known.prefix:
        return known.prefix
    for prefix, own in _OWN_MODULES.items():
        if any(name.startswith(own) for name in names):
            return prefix
    raise AdapterError(
        f"{folder} is of one tower alone, and adapter_config.json does not say which: add to it "
        '"auto_mapping": {"base_model_class": "CLIPTextModel"} or "CLIPVisionModel", whichever it was made on'
    )


def read_peft(
    tensors: Mapping[str, Tensor], configuration: dict[str, Any], folder: Path, known: Twin = CLIP
) -> AdapterFile:
    """Read an adapter of a `transformers.CLIPModel`, `SiglipModel` or `Siglip2Model`, or of one tower.

    Args:
        tensors: `adapter_model.safetensors`.
        configuration: `adapter_config.json`.
        folder: named in errors.
        known: the names of the base at hand, for adapters in those of the base itself.

    Raises:
        AdapterError: the configuration is of something else than LoRA, names lie outside the model or are not
            what the configuration announces, one half of a pair is missing, or weights and configuration
            disagree.
    """
    twin = known if known.paths and _class_of(configuration) not in _KNOWN else _twin(tensors, configuration)
    prefix = "" if twin.paths else _tower_prefix(tensors, configuration, folder, known)
    kind, config = read_variant(configuration, folder)
    base = named_base(configuration, "transformers")
    found = AdapterFile(folder, {}, LoraConfig(), configuration, base, path_prefix=prefix, twin=twin)
    surplus = []
    shared = {f"{_SHARED_PREFIX}{peft}": own for own, peft in kind.peft_shared_names.items()}
    for name, tensor in tensors.items():
        if name in shared:
            found.shared[shared[name]] = tensor
            continue
        bare = name.removeprefix(_PREFIX)
        bare = f"{prefix}{bare}" if prefix and bare.startswith(_BARE) else bare
        if not _sort(bare, tensor, kind, config, found):
            surplus.append(name)
    if surplus:
        _check_saved(surplus, config, folder)
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on {_told(twin)}, or that "
            f"adapter_config.json does not announce: {some([repr(name) for name in surplus])}; train it on "
            "that model, or drop them"
        )
    _drop_ignored(found)
    if not (found.parts or found.full):
        raise AdapterError(f"{folder} lacks the weights of every site: it is incomplete; save it again")
    _check_whole(found, kind, config)
    return replace(found, settings=_settings(kind, found, config))


def _drop_ignored(found: AdapterFile) -> None:
    """Leave out what PEFT has at SigLIP's pooling attention or SigLIP 2's position table, where it is idle.

    Both weights are read past their module. An update there never has a gradient either, so that one of the
    usual initialization is zero, and nothing is said of it.
    """
    if found.twin not in (SIGLIP, SIGLIP2) or str(found.config.get("peft_type")).startswith(OWN_TYPE):
        return
    for site in foreign_to_peft(found):
        parts = found.parts.pop(site)
        if all(bool(tensor.any()) for tensor in parts.values()):
            log.warning(
                "%s: PEFT's update of %s never acted, as %s reads that weight without its module: left out",
                *(found.path, site, found.twin.name),
            )


def _check_saved(surplus: Sequence[str], config: Config, folder: Path) -> None:
    """Say of whole modules that `modules_to_save` announces, such as layer norms, that they are not read."""
    paths = [name.removeprefix(_PREFIX).rpartition(".")[0] for name in surplus]
    saved = [path for path in paths if any(f".{name}." in f".{path}." for name in config.modules_to_save)]
    if saved:
        raise AdapterError(
            f"{folder} holds whole modules that its modules_to_save announces, {some(dict.fromkeys(saved))}: "
            "of those clipgraft reads linear layers and embeddings alone, and no layer norms; merge it "
            "with PEFT (merge_and_unload()) and use the model, or train it without them"
        )


def _sort(name: str, tensor: Tensor, kind: type[LoraLayer], config: Config, found: AdapterFile) -> bool:
    """Put a tensor where it belongs; False if it belongs nowhere."""
    for dots in (1, 2):  # q_proj.bias, q_proj.lora_A.weight
        path, *rest = name.rsplit(".", dots)
        suffix, site = ".".join(rest), _site_or_none(path, found.twin)
        own = suffix.removeprefix("base_layer.")
        if (
            own == "bias"
            and (site is not None or dots == 1)
            and not path.endswith((".base_layer", ".lora_B"))
        ):
            found.biases[path] = tensor
            return config.bias != "none"
        if site is None:
            continue
        if own == "weight":
            found.full[site] = tensor
            return any(f".{path}".endswith(f".{kept}") for kept in config.modules_to_save)
        if suffix == "lora_B.bias":
            found.offsets[site] = tensor
            return config.lora_bias
        # Older versions of PEFT write vectors as the weight of a module.
        names = {peft: part for part, peft in kind.peft_names(site).items()}
        part = names.get(suffix) or names.get(suffix.removesuffix(".weight"))
        if part is not None:
            found.parts.setdefault(site, {})[part] = kind.from_peft(part, tensor)
            return True
    return False


def _check_whole(found: AdapterFile, kind: type[LoraLayer], config: Config) -> None:
    """Refuse adapters that lack a part which their configuration announces; PEFT only warns."""
    lacking = [
        f"{site} ({suffix})"
        for site, parts in found.parts.items()
        for part, suffix in kind.peft_names(site).items()
        if part not in parts
    ]
    if config.lora_bias:
        lacking += [f"{site} (lora_B.bias)" for site in found.parts if site not in found.offsets]
    stray = [str(site) for site in found.offsets if site not in found.parts]
    twice = [str(site) for site in found.full if site in found.parts]
    for sites, fault in (
        (lacking, "lacks weights of"),
        (stray, "has biases of B, but no A and B, for"),
        (twice, "has both a whole weight and an update for"),
    ):
        if sites:
            raise AdapterError(f"{found.path} {fault} {some(sites)}: it is incomplete; save it again")


def _site_or_none(path: str, twin: Twin) -> Site | None:
    try:
        return path_site(path, twin)
    except AdapterError:
        return None


_MOST_KEYS = 10_000
OWN_TYPE = "CLIPGRAFT_"  # before a PEFT type: what PEFT itself is to refuse
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


def config_json(adapter: AdapterFile) -> dict[str, Any]:
    """`adapter_config.json`: what stock PEFT needs to rebuild these very layers."""
    own = variant_of(adapter.settings).peft_config(adapter.settings)
    # PEFT reads pattern keys as regular expressions.
    patterns: dict[str, Any] = {
        key: {
            re.escape(_saved_path(site, adapter)): own[key][str(site)]
            for site in adapter.parts
            if str(site) in own[key]
        }
        for key in ("rank_pattern", "alpha_pattern")
        if key in own
    }
    return {
        **own,
        **patterns,
        "task_type": None,
        "auto_mapping": {"base_model_class": adapter.twin.name, "parent_library": adapter.twin.library},
        "base_model_name_or_path": adapter.base.get("name", "").removeprefix("hf:") or None,
        "inference_mode": True,
        "target_modules": [_saved_path(site, adapter) for site in adapter.parts],
        "peft_type": f"{OWN_TYPE if foreign_to_peft(adapter) else ''}{own['peft_type']}",
    }


def foreign_to_peft(adapter: AdapterFile) -> list[Site]:
    """The sites at which stock PEFT has no module of the base's twin to adapt."""
    return [site for site in adapter.parts if not is_module_of(site, adapter.twin)]


def _twin(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Twin:
    """The class of transformers that an adapter was written for."""
    kind = _class_of(config)
    if kind.startswith("Siglip"):
        return SIGLIP2 if kind.startswith("Siglip2") else SIGLIP
    paths = [name.removeprefix(_PREFIX) for name in tensors]
    headed = any(path.startswith(("text_model.head.", "vision_model.head.", "head.")) for path in paths)
    return SIGLIP if headed else CLIP


def missing_sites(file: AdapterFile, sites: Iterable[Site], twin: Twin) -> list[Site]:
    """Sites of a model that the configuration targets and the weights lack, in the towers that they adapt.

    `twin` has the names of the model, which count where the file is in its own. PEFT only warns of missing
    ones. A pattern that is not matched here is passed over with a line that says so: the weights tell the
    sites without it.
    """
    there = {*file.parts, *file.full}
    towers = {site.tower for site in there}
    names = twin if file.twin.paths else file.twin
    # A pattern of PEFT's may match the name of a place at which it found no module.
    ours = str(file.config.get("peft_type")).startswith(OWN_TYPE)
    paths = {
        site_path(site, names).removeprefix(file.path_prefix): site
        for site in sites
        if site.tower in towers and (ours or is_module_of(site, names))
    }
    try:
        return [site for path in targeted(file.config, paths) if (site := paths[path]) not in there]
    except PatternError as error:
        log.info("target_modules: whether the adapter is complete cannot be told: %s", error)
        return []


def named_base(config: Mapping[str, Any], family: str) -> dict[str, str]:
    """The base that PEFT recorded, as `load` takes it: a local folder as it is, anything else as a hub id."""
    name = config.get("base_model_name_or_path")
    name = name.strip() if isinstance(name, str) and "\0" not in name else ""
    if name and not folder_exists(name):
        name = f"hf:{name}" if family == "transformers" else ""
    return {"name": name, "pretrained": "", "family": family}


def read_variant(
    config: Mapping[str, Any], folder: Path, *, plain: bool = False
) -> tuple[type[LoraLayer], Config]:
    """The variant of an adapter, and its configuration.

    Raises:
        AdapterError: a value is of another type than PEFT writes, or PEFT computes something else with it
            than the variant and this package's options tell; with `plain`, something else than W + s·B·A.
    """
    if isinstance(config.get("peft_type"), str):
        config = {**config, "peft_type": config["peft_type"].removeprefix(OWN_TYPE)}
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
    given = {key: value for key, value in config.items() if value is not None}
    return kind, as_record(given, Config, folder / CONFIG_FILE)


@dataclass(frozen=True)
class Config:
    """What is read of `adapter_config.json`, in the keys of PEFT's LoRA and with its defaults."""

    r: Rank = 8
    lora_alpha: Finite = 8.0
    lora_dropout: Finite = 0.0
    use_rslora: Flag = False
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Finite] = field(default_factory=dict)
    bias: str = "none"
    lora_bias: Flag = False
    modules_to_save: list[str] = field(default_factory=list)
    variant_options: dict[str, Any] = field(default_factory=dict)

    def rules(self, folder: Path) -> Callable[[str], tuple[int, float]]:
        """Return what gives rank and alpha of a module path without PEFT's prefix.

        By PEFT's own rule: the first key of a pattern that matches the end of the path.

        Raises:
            AdapterError: a key is no pattern.
        """
        ranks = _compiled(self.rank_pattern, "rank_pattern", folder)
        alphas = _compiled(self.alpha_pattern, "alpha_pattern", folder)

        def rule(module: str) -> tuple[int, float]:
            r = next((own for matches, own in ranks if matches(module)), self.r)
            return r, next((own for matches, own in alphas if matches(module)), self.lora_alpha)

        return rule


def _compiled(pattern: Mapping[str, T], key: str, folder: Path) -> list[tuple[Matches, T]]:
    if len(pattern) > _MOST_KEYS:
        raise AdapterError(
            f"{folder}: {key} has {len(pattern):,} keys, more than a model has modules: save it again"
        )
    rules: list[tuple[Matches, T]] = []
    for expression, value in pattern.items():
        try:
            rules.append((end_of_path(expression), value))
        except PatternError as error:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {key} key {shown(expression)} is not matched: {error}; "
                "name the modules by their paths, or by a plain expression such as layers\\.[0-3]\\..*q_proj"
            ) from error
    return rules


def _settings(kind: type[LoraLayer], found: AdapterFile, config: Config) -> LoraConfig:
    """The settings that scale stored tensors; raises AdapterError if they do not fit them."""
    rule = config.rules(found.path)
    paths = {site: site_path(site, found.twin).removeprefix(found.path_prefix) for site in found.parts}
    wanted = {site: rule(path) for site, path in paths.items()}
    for site, parts in found.parts.items():
        if kind.rank_of(parts) != wanted[site][0]:
            raise AdapterError(
                f"{found.path}: {site} has {told_shapes(parts)} where the configuration says "
                f"rank {wanted[site][0]}: the files are of two adapters; copy them together again"
            )
    return lora_config(
        found.path,
        config.r,
        config.lora_alpha,
        {site: r for site, (r, _) in wanted.items()},
        {site: alpha for site, (_, alpha) in wanted.items()},
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        variant=kind.variant,
        variant_options=config.variant_options,
        bias="lora_only" if config.lora_bias else config.bias,
    )


def told_shapes(parts: Parts) -> str:
    """The shapes of stored tensors for a message."""
    return ", ".join(f"{name.removeprefix('lora_')} {tuple(t.shape)}" for name, t in parts.items())
