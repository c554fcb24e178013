"""The options of a LoRA adapter, and a rank for those who leave it open."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from clipgraft.options import Alpha, AlphaPattern, Dropout, Options, RankPattern, Settings

Bias = Literal["none", "lora_only", "all"]
Initialization = Literal["default", "pissa", "eva"]
Variant = Literal["lora", "dora", "vera"]
Task = Literal["classification", "retrieval"]
_SIZES = (10_000, 50_000, 100_000)
_RANKS: dict[Task, tuple[int, ...]] = {"classification": (4, 8, 16, 32), "retrieval": (8, 16, 32, 64)}


def _whole(value: Any) -> Any:
    return "true" if value is True else value  # which is no number


def _expression(value: Any) -> Any:
    """A list of terms as one expression."""
    return ",".join(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


class LoraConfig(Options):
    """What an adapter is: what `apply_lora` takes, and what adapter files record.

    `use_dora=True` says `variant="dora"`.
    """

    r: Annotated[int, Field(ge=1), BeforeValidator(_whole)] = Field(16, description="rank of every update")
    alpha: Alpha = Field(16, description="the update is scaled by alpha/r (default: r, a scale of 1)")
    dropout: Dropout = Field(0.0, description="dropout on the adapter path, in training alone")
    targets: Annotated[str, BeforeValidator(_expression)] = Field(
        "text-attention", description="target set or sites, e.g. text-attention or text.*.q,v"
    )
    variant: Variant = Field(
        "lora",
        description="lora, dora (trains a magnitude of each output beside the direction) or vera (trains two "
        "vectors a site between random matrices that all sites share)",
    )
    variant_options: Settings = Field(
        {}, description="of the variant alone, KEY=VALUE: projection_prng_key, save_projection, d_initial"
    )
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    bias: Bias = Field(
        "none", description="biases to train too: lora_only: those of adapted sites; all: every bias"
    )
    init: Initialization = Field(
        "default",
        description="initialization of the factors: random, from the base's weights (pissa), or from "
        "the data (eva)",
    )
    rank_pattern: RankPattern = Field({}, description="other ranks for some sites: text.0.*=4,text.11.*=32")
    alpha_pattern: AlphaPattern = Field({}, description="other alphas for some sites")
    train_logit_scale: bool = Field(
        False, description="train the temperature (and SigLIP's logit_bias) with the adapter"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """Alpha is r where it is left open; `use_dora` names the variant."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        use_dora = filled.pop("use_dora", None)
        if use_dora is True and filled.get("variant", "dora") != "dora":
            raise ValueError("`use_dora` and `variant` name two variants: give one of them")
        if use_dora is True:
            filled.setdefault("variant", "dora")
        if filled.get("alpha") is None:
            r = filled.get("r")
            filled["alpha"] = r if isinstance(r, int | str) and str(r).isdecimal() and int(r) else 16
        return filled

    @property
    def use_dora(self) -> bool:
        """Whether the variant is DoRA."""
        return self.variant == "dora"

    def record(self) -> dict[str, Any]:
        """The options as files and runs record them; `variant` stands in records of VeRA and later ones."""
        values = self.model_dump()
        variant, options = values.pop("variant"), values.pop("variant_options")
        values["use_dora"] = self.use_dora
        values["alpha"] = as_written(self.alpha)
        values["alpha_pattern"] = {site: as_written(alpha) for site, alpha in self.alpha_pattern.items()}
        if variant not in ("lora", "dora"):
            values |= {"variant": variant, "variant_options": options}
        return values


def as_written(value: float) -> float:
    """16.0 -> 16: a number that a person may read, and that PEFT types as an integer."""
    return int(value) if value == int(value) else value


def auto_rank(samples: int, task: Task) -> tuple[int, str]:
    """The rank for a number of training pairs, and the reason in words.

    Retrieval gets 8, 16, 32 or 64 below 10,000, below 50,000, up to 100,000 and beyond; telling a few classes
    apart takes half of that. Both stay within what is commonly advised for these sizes.
    """
    place = bisect.bisect_right(_SIZES, samples)
    bounds = ("fewer than 10,000", "10,000 to 50,000", "50,000 to 100,000", "100,000 or more")
    rank = _RANKS[task][place]
    return rank, f"r={rank} for {task} with {samples:,} pairs ({bounds[place]})"
