"""The variants of LoRA: a new one is a class in a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.dora import Dora
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.plain import PlainLora
from clipgraft.lora.vera import Vera
from clipgraft.models.sites import SiteRef

VARIANTS: dict[str, type[LoraLayer]] = {kind.variant: kind for kind in (PlainLora, Dora, Vera)}


def variant_of(config: LoraConfig) -> type[LoraLayer]:
    """The class of a configuration's layers."""
    return VARIANTS[config.variant]


def check_variant(config: LoraConfig, refs: Iterable[SiteRef] = ()) -> None:
    """Refuse options and sites that a variant does not have.

    Raises:
        ConfigError: with all of them at once.
    """
    kind = variant_of(config)
    faults = kind.faults(config)
    if config.init not in kind.initializations:
        faults.append(
            f"`init`: got {config.init!r}, allowed is one of {', '.join(map(repr, kind.initializations))}"
        )
    others = [str(ref.site) for ref in refs if ref.kind not in kind.kinds]
    if others:
        more = ", …" if len(others) > 3 else ""
        faults.append(f"it acts on linear layers alone: leave {', '.join(others[:3])}{more} out of `targets`")
    if faults:
        raise ConfigError(f"{kind.label}: {'; '.join(faults)}")


def variant_in_peft(config: Mapping[str, Any]) -> tuple[type[LoraLayer], dict[str, Any]]:
    """The variant that an `adapter_config.json` is of, and the same configuration in the keys of PEFT's LoRA.

    Raises:
        AdapterError: it is of none.
    """
    for kind in VARIANTS.values():
        read = kind.read_peft_config(config)
        if read is not None:
            return kind, read
    known = dict.fromkeys(kind.peft_config(LoraConfig())["peft_type"] for kind in VARIANTS.values())
    raise AdapterError(f"clipgraft reads {' and '.join(map(repr, known))}")
