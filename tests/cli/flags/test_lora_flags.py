"""The flags of an adapter and the fields of `LoraConfig`, which are one declaration."""

from __future__ import annotations

import pytest

from clipgraft.cli.flags.groups import build_options
from clipgraft.cli.flags.training import LoraFlags
from clipgraft.cli.terminal import Wording
from clipgraft.errors import ConfigError
from clipgraft.lora.config import LoraConfig


def test_every_option_of_an_adapter_has_a_flag() -> None:
    """An option that Python has cannot be given on the command line, or is lost on its way."""
    assert set(LoraFlags.library_names) == {*LoraConfig.model_fields, "use_dora", "target_modules"}
    assert set(LoraFlags.library_names.values()) <= set(LoraFlags.model_fields)
    (flags,) = build_options(
        [LoraFlags],
        {
            "lora_variant": "vera",
            "lora_variant_options": ["d_initial=0.2", "save_projection=false"],
            "lora_dropout": "0.3",
            "lora_bias": "all",
        },
    )
    assert flags.adapter(8, "linear") == LoraConfig(
        r=8,
        targets="linear",
        variant="vera",
        variant_options={"d_initial": 0.2, "save_projection": False},
        dropout=0.3,
        bias="all",
    )


def test_the_short_flag_of_dora() -> None:
    """`--lora-dora` no longer says DoRA, or says it beside another variant."""
    assert LoraFlags(lora_dora=True).adapter(4, "all").variant == "dora"
    with pytest.raises(ConfigError, match="name two variants"):
        LoraFlags(lora_dora=True, lora_variant="vera").adapter(4, "all")


def test_messages_of_the_library_name_flags() -> None:
    """A message names a field that the command line does not know."""
    wording = Wording()
    wording.learn([LoraFlags])
    assert wording("leave `alpha`, `use_rslora` and `rank_pattern` out of `targets`") == (
        "leave --lora-alpha, --lora-rslora and --lora-rank-pattern out of --lora-targets"
    )
