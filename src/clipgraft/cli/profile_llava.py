"""LLaVA-NeXT behind `clipgraft profile`."""

from __future__ import annotations

import json

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.tools import ProfileFlags
from clipgraft.errors import together
from clipgraft.models.meta import ModelConfig
from clipgraft.profile.llava import MODEL_TYPE, LlavaProfile, LlavaTokens, llava_costs, llava_on_meta
from clipgraft.profile.tables import llava_table
from clipgraft.profile.tree import cost_tree
from clipgraft.results import plain
from clipgraft.text_tables import terminal_width

_OF_CLIP = ("targets", "lora_r", "batch_size", "adapter", "measure", "device", "precision", "pretrained")
_COUNTS = ("crops", "language_tokens", "logits")
_IMAGE, _TEXT_TOKENS = (480, 640), 64


def is_llava(config: ModelConfig) -> bool:
    """Whether a configuration is of LLaVA-NeXT."""
    return config.values.get("model_type") == MODEL_TYPE


def show_llava(config: ModelConfig, spec: ProfileFlags) -> None:
    """Profile and print.

    Raises:
        ConfigError: flags that are of CLIP alone, or counts that are not complete.
        ModelError: no model can be built from the configuration.
    """
    tokens = _tokens(spec)
    model = llava_on_meta(config.values)
    profile = llava_costs(
        model,
        image_size=spec.image_size or _IMAGE,
        text_tokens=spec.text_tokens or _TEXT_TOKENS,
        tokens=tokens,
    )
    if spec.format == "json":
        document = plain(profile, without=frozenset({"trace"}))
        document["layers"] = plain(profile.trace.layers)
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    head, tree, table = (
        _head(config.name, profile),
        cost_tree(model, profile.trace, spec.depth),
        llava_table(profile),
    )
    if spec.format == "markdown":
        print("\n\n".join([f"# {head}", f"```text\n{tree}\n```", table.markdown()]))
    else:
        print("\n\n".join([head, tree, table.text(terminal_width())]))


def _tokens(spec: ProfileFlags) -> LlavaTokens | None:
    """The counts that were given, if any."""
    given = spec.model_fields_set
    faults = [
        f"{flag(name)}: of CLIP alone, and {spec.model} is LLaVA-NeXT" for name in _OF_CLIP if name in given
    ]
    counts = [name for name in _COUNTS if name in given]
    missing = [name for name in _COUNTS if name not in given]
    if counts and missing:
        faults.append(
            f"{', '.join(map(flag, counts))} given without {', '.join(map(flag, missing))}: give all"
        )
    faults += [
        f"{flag(name)} and {flag(counts[0])} both say how much runs: give one of them"
        for name in ("image_size", "text_tokens")
        if counts and name in given
    ]
    if faults:
        raise together(faults)
    if spec.crops is None or spec.language_tokens is None or spec.logits is None:
        return None
    return LlavaTokens(spec.crops, spec.language_tokens, spec.logits)


def _head(name: str, profile: LlavaProfile) -> str:
    tokens = profile.tokens
    source = ""
    if profile.image_size is not None:
        source = "an image of {}x{}: ".format(*profile.image_size)
    return (
        f"{name}: {profile.trace.total.parameters:,} weights, {profile.weight_bytes / 1e9:.2f} GB "
        f"({profile.weight_bytes / 2**30:.2f} GiB) in {profile.dtype}\n"
        f"{source}{tokens.crops:,} crops, {tokens.language:,} tokens of the language model, "
        f"{tokens.logits:,} of them with logits"
    )
