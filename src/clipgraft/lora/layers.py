"""The update of one site: the protocol that every variant of LoRA follows, and its arithmetic.

A variant is a subclass, listed in `clipgraft.lora.variants`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.models.sites import Site, SiteKind, SiteRef

if TYPE_CHECKING:
    from clipgraft.lora.config import Initialization, LoraConfig

BY_ROW: tuple[SiteKind, ...] = ("embedding", "table")
Parts = Mapping[str, Tensor]
"""Tensors that a variant stores, of one site or of all together, by the names of its attributes."""


class LoraLayer(nn.Module):
    """The low-rank update of one site, without the base weight.

    Hooks, fused attention, the engine, mixed batches, merging and files know an update by this protocol
    alone. What a variant must define raises NotImplementedError here.

    *The change of the host*, which the methods below turn into outputs and weights:

        W' = rescale ∘ (W + scaling · B·A)        b' = b + lora_bias

    - `factors()`: A and B, (r, in) and (out, r), differentiable in whatever trains; `scaling`: a number;
    - `rescale(weight)`: a factor for each output, of classes that say `rescales`;
    - `lora_bias`: (out,) or None; `dropout`: probability on the input of A in training mode.

    *What trains*: the Parameters, made by `make_parameters` so that the update has no effect; `reset(weight)`
    does the same for those that depend on W. `starts_at_zero` names the one that is zero.

    *What is stored*: `stored()` and `restore(parts)` by attribute name, `part_shapes` and `rank_of` of a
    file; and what all sites of an adapter share (`make_shared`, `stored_shared`).

    *How PEFT calls it*: `peft_names` and `peft_shared_names` of the tensors, `as_peft` and `from_peft` for
    their shapes, `peft_config` and `read_peft_config`.

    All weights are fp32 whatever the base's type.

    Attributes:
        variant: its name in `LoraConfig.variant`; `label` is the one in prose.
        kinds: of sites that it can act on.
        initializations: of `LoraConfig.init` that it has.
        beyond_lora: what it stores that formats of plain LoRA cannot hold, in words; empty for nothing.
    """

    variant: ClassVar[str]
    label: ClassVar[str]
    rescales: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = get_args(SiteKind)
    initializations: ClassVar[tuple[Initialization, ...]] = ("default",)
    beyond_lora: ClassVar[str] = ""
    peft_shared_names: ClassVar[Mapping[str, str]] = {}

    lora_bias: nn.Parameter | None

    def __init__(
        self,
        ref: SiteRef,
        r: int,
        alpha: float,
        config: LoraConfig | None = None,
        *,
        bias: bool = False,
        shared: Any = None,
    ) -> None:
        """`r` and `alpha` are this site's own; `shared` is what `make_shared` gave for all sites."""
        super().__init__()
        self.kind: SiteKind = ref.kind
        self.r = r
        self.alpha = alpha
        self.scaling = self.scale_of(alpha, r, config is not None and config.use_rslora) if r else 0.0
        self.dropout = 0.0 if config is None else config.dropout
        self.make_parameters(ref, r, config, shared)
        self.lora_bias = nn.Parameter(torch.zeros(outputs_of(ref))) if bias else None

    # What a variant defines: the change of the host.

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update as it stands."""
        raise NotImplementedError

    @staticmethod
    def scale_of(alpha: float, r: int, use_rslora: bool) -> float:
        """The s of W + s·B·A."""
        raise NotImplementedError

    def rescale(self, weight: Tensor) -> Tensor:
        """The factor of each output, (out,), for the base's W in canonical shape."""
        raise NotImplementedError

    # What a variant defines: its Parameters.

    def make_parameters(self, ref: SiteRef, r: int, config: LoraConfig | None, shared: Any) -> None:
        """Make the Parameters of the update, so that it has no effect."""
        raise NotImplementedError

    def reset(self, weight: Tensor) -> None:
        """Set what depends on the base's W (canonical shape) so that the update has no effect."""

    @property
    def starts_at_zero(self) -> nn.Parameter:
        """The Parameter that is zero at the start, which makes the update zero."""
        raise NotImplementedError

    @property
    def adds_nothing(self) -> bool:
        """Whether B·A is zero."""
        return not bool(self.starts_at_zero.any())

    @classmethod
    def faults(cls, config: LoraConfig) -> list[str]:
        """What of a configuration the variant does not have."""
        return [f"{cls.label} has no `variant_options`"] if config.variant_options else []

    # What a variant defines: files.

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a file holds of this site, by attribute name."""
        raise NotImplementedError

    def restore(self, parts: Parts, weight: Tensor) -> None:
        """Take over stored tensors; `weight` is the base's W, for what is not stored."""
        with torch.no_grad():
            for name, tensor in parts.items():
                self.get_parameter(name).copy_(tensor)

    @classmethod
    def part_shapes(cls, ref: SiteRef, r: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that is stored of a site of rank r."""
        raise NotImplementedError

    @classmethod
    def rank_of(cls, parts: Parts) -> int | None:
        """The rank of stored tensors; None if they do not agree on one."""
        raise NotImplementedError

    @classmethod
    def make_shared(cls, config: LoraConfig, refs: Iterable[SiteRef], stored: Parts) -> Any:
        """What all sites of an adapter share, out of a file's shared tensors or made anew; None for nothing.

        Raises:
            ConfigError: the stored tensors do not fit the sites.
        """
        return None

    @classmethod
    def stored_shared(cls, shared: Any, config: LoraConfig) -> dict[str, Tensor]:
        """The tensors that a file holds of what is shared, by name."""
        return {}

    @classmethod
    def peft_names(cls, site: Site) -> dict[str, str]:
        """What PEFT puts behind a module's path for each stored tensor, by attribute name."""
        raise NotImplementedError

    @classmethod
    def as_peft(cls, name: str, parts: Parts) -> Tensor:
        """A stored tensor of a site in PEFT's shape; `parts` are all that are stored of the site."""
        return parts[name]

    @classmethod
    def from_peft(cls, name: str, tensor: Tensor) -> Tensor:
        """A tensor of PEFT's in the shape that is stored."""
        return tensor

    @classmethod
    def peft_config(cls, config: LoraConfig) -> dict[str, Any]:
        """The keys of `adapter_config.json` that the variant has of its own."""
        raise NotImplementedError

    @classmethod
    def read_peft_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same configuration in the keys of PEFT's LoRA; None if it is of another variant."""
        raise NotImplementedError

    # What follows from it.

    @property
    def is_plain(self) -> bool:
        """Whether W + s·B·A is all there is to it."""
        return not self.rescales and self.lora_bias is None

    @property
    def is_zero(self) -> bool:
        """Whether the update is known to change no bit."""
        return self.is_plain and self.adds_nothing

    def forward(self, x: Tensor, host: nn.Module | None = None) -> Tensor:
        """What s·B·A adds to the host's output for the host's input `x`.

        (..., in) -> (..., out) for linear sites, (...) ids -> (..., dim) for embeddings, (N, in, H, W) ->
        (N, out, H', W') for a convolution with the stride and padding of `host`. Dropout acts on `x` in
        training mode, except on ids. The result has the type of A (or of autocast).
        """
        a, b = self.factors()
        if self.kind == "embedding":
            # M2M100 (NLLB) multiplies what it looks up.
            return F.embedding(x, a.T) @ b.T * (self.scaling * getattr(host, "embed_scale", 1.0))
        x = x.to(a.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if isinstance(host, nn.Conv2d):
            if host.groups > 1:
                # Each output reads channels of its own, which no common A could.
                delta = self.delta_weight()
                return F.conv2d(x, delta, None, host.stride, host.padding, host.dilation, host.groups)
            x = F.conv2d(x, a, None, host.stride, host.padding, host.dilation)
            return F.conv2d(x, b) * self.scaling
        return F.linear(F.linear(x, a), b) * self.scaling

    def adapt(
        self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, host: nn.Module | None = None
    ) -> Tensor:
        """The host's output with the update: `y` is what the base gives for `x`, shapes as in `forward`.

        `weight` is the base's in canonical shape (`SiteRef.shape`), `bias` the base's (out,); only variants
        that rescale need them.
        """
        update: Tensor = self(x, host)
        if self.is_plain:
            return y + update.to(y.dtype)

        def outputs(vector: Tensor) -> Tensor:
            return vector[:, None, None] if isinstance(host, nn.Conv2d) else vector

        if not self.rescales:
            adapted = y + update.to(y.dtype)
        else:
            offset = None if bias is None else outputs(bias)
            adapted = ((y if offset is None else y - offset) + update) * outputs(self.rescale(weight))
            adapted = adapted.to(y.dtype) if offset is None else adapted.to(y.dtype) + offset
        return adapted if self.lora_bias is None else adapted + outputs(self.lora_bias).to(y.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        """W' for the base's W, both in canonical shape, computed in fp32 and of the type of W."""
        if not self.rescales:
            return weight + self.delta_weight().to(weight.dtype)
        matrix = self.moved(weight) * self.rescale(weight)[:, None]
        return self._canonical(matrix, weight.shape).to(weight.dtype)

    def weight_change(self, weight: Tensor) -> Tensor:
        """W' - W in the canonical shape of the weight, fp32 or wider."""
        if not self.rescales:
            return self.delta_weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.folded(wide) - wide

    def change_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(R, in) and (out, R), detached, whose product is W' - W; convolutions flattened.

        A rescaled weight changes by a matrix of full rank, which is paired with an identity.
        """
        if not self.rescales:
            a, b = (factor.detach().flatten(1) for factor in self.factors())
            return a, b * self.scaling
        change = self.matrix(self.weight_change(weight)).detach()
        identity = torch.eye(min(change.shape), device=change.device)
        return (identity, change) if change.shape[1] <= change.shape[0] else (change, identity)

    def delta_weight(self) -> Tensor:
        """s·B·A in the canonical shape of the site's weight (`SiteRef.shape`), in the type of A."""
        a, b = self.factors()
        delta = b.flatten(1) @ a.flatten(1) * self.scaling
        return self._canonical(delta, (b.shape[0], *a.shape[1:]))

    def matrix(self, weight: Tensor) -> Tensor:
        """A canonical weight as the (out, in) matrix that B·A is added to, as a view."""
        return weight.T if self.kind in BY_ROW else weight.flatten(1)

    def moved(self, weight: Tensor) -> Tensor:
        """W + s·B·A as an (out, in) matrix, fp32 or wider."""
        a, b = self.factors()
        wide = self.matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))
        return torch.addmm(wide, b.flatten(1), a.flatten(1), alpha=self.scaling)

    def _canonical(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.T if self.kind in BY_ROW else matrix.reshape(shape)

    def extra_repr(self) -> str:
        kinds = "" if self.variant == "lora" else f" {self.label}"
        return f"{self.kind}{kinds}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def outputs_of(ref: SiteRef) -> int:
    """The number of outputs of a site."""
    return ref.shape[1] if ref.kind in BY_ROW else ref.shape[0]


class BiasLayer(nn.Module):
    """What an adapter adds to the bias of a layer norm, (dim,)."""

    lora_bias: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lora_bias = nn.Parameter(torch.zeros(dim))


class AdapterSlot(nn.Module):
    """The updates of one place by adapter name, of which at most one is in effect.

    Attributes:
        active: the name of the adapter in effect; None, or that of one without an update here, for none.
    """

    active: str | None = None

    def put(self, name: str, layer: nn.Module) -> None:
        """Hang an adapter's update here."""
        self.add_module(_key(name), layer)

    def drop(self, name: str) -> None:
        """Take an adapter's update off, if there is one."""
        self._modules.pop(_key(name), None)

    @property
    def current(self) -> LoraLayer | None:
        """The update of a site that is in effect."""
        layer = self._active_layer()
        return layer if isinstance(layer, LoraLayer) else None

    @property
    def current_bias(self) -> BiasLayer | None:
        """The addition to the bias of a norm that is in effect."""
        layer = self._active_layer()
        return layer if isinstance(layer, BiasLayer) else None

    def _active_layer(self) -> nn.Module | None:
        return None if self.active is None else self._modules.get(_key(self.active))


_TAKEN = frozenset(dir(AdapterSlot()))


def _key(name: str) -> str:
    """What a module calls an adapter: an adapter named `half` must not hide a module's own method."""
    return f"@{name}" if name in _TAKEN else name
