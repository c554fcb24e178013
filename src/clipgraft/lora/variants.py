"""The variants of LoRA: plain LoRA and DoRA, VeRA of its own file, and what is asked of all of them.

Plain LoRA is W' = W + s·B·A with s = α/r (Hu et al. 2021, arXiv:2106.09685, eq. 3), or α/√r (rsLoRA,
Kalajdzievski 2023, arXiv:2312.03732). Weights have PEFT's shapes, so that files need no transposition.

DoRA is W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖, one magnitude and one norm for each output (Liu et al. 2024,
arXiv:2402.09353, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from clipgraft.errors import AdapterError, ConfigError
from clipgraft.lora.config import Initialization, LoraConfig, as_written
from clipgraft.lora.layers import BY_ROW, LoraLayer, Parts, outputs_of
from clipgraft.lora.vera import Vera
from clipgraft.models.sites import Site, SiteRef

_EMBEDDINGS = ("token_embedding", "position_embedding")


class PlainLora(LoraLayer):
    """An update by a trained A and B.

    Attributes:
        lora_A, lora_B: (r, in), (out, r) for linear sites; (r, rows), (dim, r) for embeddings and position
            tables; (r, in / groups, h, w), (out, r, 1, 1) for convolutions.
        lora_start_A, lora_start_B: the frozen product that an initialization on the base's own directions
            subtracts again (PiSSA); None for other initializations.
    """

    variant = "lora"
    label = "LoRA"
    initializations: ClassVar[tuple[Initialization, ...]] = ("default", "pissa", "eva")

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_start_A: Tensor | None
    lora_start_B: Tensor | None

    def make_parameters(self, ref: SiteRef, r: int, config: LoraConfig | None, shared: Any) -> None:
        """A Kaiming, B zero; the other way round for embeddings. Either way ΔW starts at exactly zero.

        With A zero, a token that never occurs in training keeps its base embedding to the bit; a random A
        would move it as soon as B moves.
        """
        shape_a, shape_b = ref.lora_shapes(r)
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32))
        self.register_buffer("lora_start_A", None)
        self.register_buffer("lora_start_B", None)
        if not r:
            self.lora_A.requires_grad_(False)
            self.lora_B.requires_grad_(False)
        elif self.kind in BY_ROW:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @staticmethod
    def scale_of(alpha: float, r: int, use_rslora: bool) -> float:
        return alpha / (math.sqrt(r) if use_rslora else r)

    @property
    def starts_at_zero(self) -> nn.Parameter:
        return self.lora_A if self.kind in BY_ROW else self.lora_B

    @property
    def is_zero(self) -> bool:
        # A start that is subtracted again leaves the rounding of the difference.
        return self.is_plain and self.lora_start_A is None and not bool(self.lora_B.any())

    @property
    def adds_nothing(self) -> bool:
        if self.lora_start_A is not None and self.lora_start_B is not None:
            return self.lora_A.equal(self.lora_start_A) and self.lora_B.equal(self.lora_start_B)
        return not (bool(self.lora_A.any()) and bool(self.lora_B.any()))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update as it stands, a frozen start included: of rank 2r with one, else r."""
        if self.lora_start_A is None or self.lora_start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_start_A]), torch.cat(
            [self.lora_B, -self.lora_start_B], dim=1
        )

    def stored(self) -> dict[str, Tensor]:
        """A and B; a frozen start as part of them, which doubles their rank."""
        a, b = self.factors()
        return {"lora_A": a, "lora_B": b}

    @classmethod
    def part_shapes(cls, ref: SiteRef, r: int) -> dict[str, tuple[int, ...]]:
        return dict(zip(("lora_A", "lora_B"), ref.lora_shapes(r), strict=True))

    @classmethod
    def rank_of(cls, parts: Parts) -> int | None:
        a, b = parts["lora_A"], parts["lora_B"]
        return int(a.shape[0]) if a.ndim >= 2 and b.ndim >= 2 and a.shape[0] == b.shape[1] else None

    @classmethod
    def peft_names(cls, site: Site) -> dict[str, str]:
        if site.role in _EMBEDDINGS:
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    @classmethod
    def peft_config(cls, config: LoraConfig) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": config.r,
            "lora_alpha": as_written(config.alpha),
            "lora_dropout": config.dropout,
            "use_rslora": config.use_rslora,
            "use_dora": False,
            "bias": config.bias,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": {site: as_written(alpha) for site, alpha in config.alpha_pattern.items()},
        }

    @classmethod
    def read_peft_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return _of_lora(config) if not config.get("use_dora") else None


def _of_lora(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration of PEFT's LoRA, which may hold keys that mean something to us alone."""
    known = {key: value for key, value in config.items() if key != "variant_options"}
    return known if config.get("peft_type") == "LORA" else None


class _Kept:
    """The last result of a function of tensors, kept while none of them changes.

    A frozen tensor is known by its storage, by where in it the tensor lies, and by the counter that a write
    in place raises. The reference to the storage is weak: it keeps no weight alive, and a new tensor at the
    address of an old one is another. One that may train is compared number by number as well, because fused
    optimizers raise no counter; with gradients nothing is kept. A copy or pickle of this object is empty.
    """

    def __init__(self) -> None:
        self._last: tuple[list[_Seen], tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()

    def get(
        self, sources: Sequence[Tensor], options: tuple[Any, ...], compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return what `compute` gives for `sources` and `options`, or gave if both are as they were."""
        if torch.compiler.is_compiling() or any(_untracked(source) for source in sources):
            return compute()
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self._last = None
            return compute()
        if self._last is not None:
            seen, known, result = self._last
            if known == options and len(seen) == len(sources) and all(map(_Seen.still, seen, sources)):
                return result
        # Not an inference tensor, even in inference mode: training may use it later.
        with torch.inference_mode(False), torch.no_grad():
            result = compute()
            self._last = ([_Seen(source) for source in sources], options, result)
        return result


class _Seen:
    """What a tensor was when it was seen last."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._place = _place(tensor)
        self._numbers = tensor.detach().clone() if tensor.requires_grad else None

    def still(self, tensor: Tensor) -> bool:
        """Whether this tensor is that one, unchanged."""
        return (
            not self._storage.expired()  # type: ignore[no-untyped-call]
            and self._storage.cdata == tensor.untyped_storage()._cdata
            and self._place == _place(tensor)
            and (not tensor.requires_grad or (self._numbers is not None and self._numbers.equal(tensor)))
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _untracked(tensor: Tensor) -> bool:
    """Whether a tensor counts no writes, or is none that has numbers."""
    return tensor.is_inference() or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter)


class Dora(PlainLora):
    """An update by A, B and a trained magnitude of each output.

    Attributes:
        lora_magnitude: (out,).
    """

    variant = "dora"
    label = "DoRA"
    rescales = True
    beyond_lora = "DoRA magnitudes"

    lora_magnitude: nn.Parameter

    def make_parameters(self, ref: SiteRef, r: int, config: LoraConfig | None, shared: Any) -> None:
        super().make_parameters(ref, r, config, shared)
        self.lora_magnitude = nn.Parameter(torch.ones(outputs_of(ref)))
        self._kept_norm = _Kept()

    def reset(self, weight: Tensor) -> None:
        """Set m to the norms, so that nothing is rescaled."""
        with torch.no_grad():
            self.lora_magnitude.copy_(self.norm(weight))

    def rescale(self, weight: Tensor) -> Tensor:
        """m / ‖W + s·B·A‖; the norm counts as a constant, as in the paper (section 4.3)."""
        scale: Tensor = self.lora_magnitude / self.norm(weight)
        return scale

    def norm(self, weight: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each output, (out,), for the base's W in canonical shape; without gradient.

        It is computed again only when W, A, B, the scale or the type of autocast has changed.
        """

        def compute() -> Tensor:
            with torch.no_grad():
                norm: Tensor = torch.linalg.vector_norm(self.moved(weight), dim=1)
            return norm

        factors = (self.lora_A, self.lora_B, self.lora_start_A, self.lora_start_B)
        sources = [weight, *(factor for factor in factors if factor is not None)]
        device = weight.device.type
        # Shapes without numbers, on `meta`, have no autocast.
        known = torch.amp.is_autocast_available(device)
        autocast = known and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self._kept_norm.get(sources, (self.scaling, autocast), compute)

    def stored(self) -> dict[str, Tensor]:
        return {**super().stored(), "lora_magnitude": self.lora_magnitude}

    def restore(self, parts: Parts, weight: Tensor) -> None:
        super().restore(parts, weight)
        if "lora_magnitude" not in parts:
            self.reset(weight)

    @classmethod
    def part_shapes(cls, ref: SiteRef, r: int) -> dict[str, tuple[int, ...]]:
        return {**super().part_shapes(ref, r), "lora_magnitude": (outputs_of(ref),)}

    @classmethod
    def peft_names(cls, site: Site) -> dict[str, str]:
        return {**super().peft_names(site), "lora_magnitude": "lora_magnitude_vector"}

    @classmethod
    def as_peft(cls, name: str, parts: Parts) -> Tensor:
        of_convolution = name == "lora_magnitude" and parts["lora_A"].ndim == 4
        return parts[name].view(1, -1, 1, 1) if of_convolution else parts[name]

    @classmethod
    def from_peft(cls, name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten() if name == "lora_magnitude" else tensor

    @classmethod
    def peft_config(cls, config: LoraConfig) -> dict[str, Any]:
        return {**super().peft_config(config), "use_dora": True}

    @classmethod
    def read_peft_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return _of_lora(config) if config.get("use_dora") else None


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
