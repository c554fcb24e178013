"""VeRA: W' = W + diag(b)·B·diag(d)·A with frozen random A and B that all sites share, and trained b and d.

Kopiczko et al. 2024, arXiv:2310.11454. A site takes the first columns of A and the first rows of B, as many
as it has inputs and outputs. An adapter is two vectors a site; A and B are drawn from a seed, and are stored
beside them where `save_projection` says so, as PEFT does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.errors import ConfigError
from clipgraft.lora.layers import LoraLayer, Parts
from clipgraft.models.sites import Site, SiteRef
from clipgraft.options import Options

if TYPE_CHECKING:
    from clipgraft.lora.config import LoraConfig

_OPTIONS = ("projection_prng_key", "save_projection", "d_initial")
_BIASES = {"lora_only": "vera_only"}  # ours and PEFT's name


class VeraOptions(Options):
    """The `variant_options` of VeRA, under PEFT's names."""

    projection_prng_key: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of A and B")
    save_projection: bool = Field(True, description="store A and B with the adapter, not the seed alone")
    d_initial: float = Field(0.1, description="what d starts at; b starts at zero")


@dataclass(eq=False)
class Projections:
    """A, (r, widest in), and B, (widest out, r), of all sites; one copy on each device that asks for it."""

    a: Tensor
    b: Tensor
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and B on a device."""
        if device not in self._copies:
            # Not inference tensors, even in inference mode: training may use them later.
            with torch.inference_mode(False), torch.no_grad():
                self._copies[device] = (self.a.to(device), self.b.to(device))
        return self._copies[device]

    def __deepcopy__(self, memo: object) -> Projections:
        return self  # nothing ever changes it


_drawn: weakref.WeakValueDictionary[tuple[int, int, int, int], Projections] = weakref.WeakValueDictionary()


def draw_projections(seed: int, r: int, inputs: int, outputs: int) -> Projections:
    """A and then B, Kaiming-uniform from one generator; adapters of one seed and shape share them."""
    key = (seed, r, inputs, outputs)
    found = _drawn.get(key)
    if found is None:
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False):
            a, b = torch.empty(r, inputs), torch.empty(outputs, r)
            for matrix in (a, b):
                nn.init.kaiming_uniform_(matrix, generator=generator)
        found = _drawn[key] = Projections(a, b)
    return found


class Vera(LoraLayer):
    """An update by two trained vectors between frozen random matrices.

    Attributes:
        vera_lambda_d: (r,), d.
        vera_lambda_b: (out,), b.
    """

    variant = "vera"
    label = "VeRA"
    kinds = ("linear", "rows", "fused", "read", "projection")
    beyond_lora = "VeRA vectors"
    peft_shared_names: ClassVar[Mapping[str, str]] = {"vera_A": "vera_A", "vera_B": "vera_B"}

    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter

    def make_parameters(self, ref: SiteRef, r: int, config: LoraConfig | None, shared: Any) -> None:
        out, self.inputs = ref.shape
        self.projections: Projections = shared
        initial = _options(config).d_initial if config is not None else VeraOptions().d_initial
        self.vera_lambda_d = nn.Parameter(torch.full((r,), initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(out))

    @staticmethod
    def scale_of(alpha: float, r: int, use_rslora: bool) -> float:
        """No scale: b and d are the scales."""
        return 1.0

    @property
    def starts_at_zero(self) -> nn.Parameter:
        return self.vera_lambda_b

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(d)·A and diag(b)·B."""
        d, b = self.vera_lambda_d, self.vera_lambda_b
        wide_a, wide_b = self.projections.on(d.device)
        return d[:, None] * wide_a[:, : self.inputs], b[:, None] * wide_b[: len(b)]

    @classmethod
    def faults(cls, config: LoraConfig) -> list[str]:
        told = VeraOptions.check(config.variant_options)
        faults = [f"{fault.field}: {fault.text}" for fault in told] if isinstance(told, list) else []
        if config.use_rslora or config.alpha != config.r:
            faults.append("`alpha` and `use_rslora` scale nothing in VeRA: leave them out")
        if config.rank_pattern or config.alpha_pattern:
            faults.append("all sites have one rank: leave `rank_pattern` and `alpha_pattern` out")
        return faults

    def stored(self) -> dict[str, Tensor]:
        return {"vera_lambda_d": self.vera_lambda_d, "vera_lambda_b": self.vera_lambda_b}

    @classmethod
    def part_shapes(cls, ref: SiteRef, r: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_d": (r,), "vera_lambda_b": (ref.shape[0],)}

    @classmethod
    def rank_of(cls, parts: Parts) -> int | None:
        d = parts["vera_lambda_d"]
        return len(d) if d.ndim == 1 else None

    @classmethod
    def make_shared(cls, config: LoraConfig, refs: Iterable[SiteRef], stored: Parts) -> Projections:
        shapes = [ref.shape for ref in refs]
        out, inner = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        r = config.r
        if not stored:
            return draw_projections(_options(config).projection_prng_key, r, inner, out)
        a, b = (stored[name].float() for name in cls.peft_shared_names)
        if a.ndim != 2 or b.ndim != 2 or len(a) != r or b.shape[1] != r or a.shape[1] < inner or len(b) < out:
            raise ConfigError(
                f"VeRA: vera_A {tuple(a.shape)} and vera_B {tuple(b.shape)} are no projections of rank {r} "
                f"for {inner} inputs and {out} outputs"
            )
        drawn = draw_projections(_options(config).projection_prng_key, r, a.shape[1], len(b))
        return drawn if torch.equal(drawn.a, a) and torch.equal(drawn.b, b) else Projections(a, b)

    @classmethod
    def stored_shared(cls, shared: Projections, config: LoraConfig) -> dict[str, Tensor]:
        keep = _options(config).save_projection
        return {"vera_A": shared.a, "vera_B": shared.b} if keep else {}

    @classmethod
    def peft_names(cls, site: Site) -> dict[str, str]:
        return {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}

    @classmethod
    def peft_config(cls, config: LoraConfig) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": config.r,
            "vera_dropout": config.dropout,
            "bias": _BIASES.get(config.bias, config.bias),
            "fan_in_fan_out": False,
            "init_weights": True,
            **_options(config).model_dump(),
        }

    @classmethod
    def read_peft_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("peft_type") != "VERA":
            return None
        ours = {peft: own for own, peft in _BIASES.items()}
        bias, r = config.get("bias"), config.get("r", 256)
        return {
            **{key: value for key, value in config.items() if not key.startswith("vera_")},
            "r": r,
            "lora_alpha": r,
            "lora_dropout": config.get("vera_dropout"),
            "bias": ours.get(bias, bias) if isinstance(bias, str) else bias,
            "variant_options": {key: config[key] for key in _OPTIONS if config.get(key) is not None},
        }


def _options(config: LoraConfig) -> VeraOptions:
    return VeraOptions(**config.variant_options)
