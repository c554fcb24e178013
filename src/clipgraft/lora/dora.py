"""DoRA: W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖, one magnitude and one norm for each output.

Liu et al. 2024, arXiv:2402.09353, eq. 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipgraft.lora.layers import Parts, outputs_of
from clipgraft.lora.plain import PlainLora, of_lora
from clipgraft.models.sites import Site, SiteRef

if TYPE_CHECKING:
    from clipgraft.lora.config import LoraConfig


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

    def reset(self, weight: Tensor) -> None:
        """Set m to the norms, so that nothing is rescaled."""
        with torch.no_grad():
            self.lora_magnitude.copy_(self.norm(weight))

    def rescale(self, weight: Tensor) -> Tensor:
        """m / ‖W + s·B·A‖; the norm counts as a constant, as in the paper (section 4.3)."""
        scale: Tensor = self.lora_magnitude / self.norm(weight)
        return scale

    def norm(self, weight: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each output, (out,), for the base's W in canonical shape; without gradient."""
        with torch.no_grad():
            norm: Tensor = torch.linalg.vector_norm(self.moved(weight), dim=1)
        return norm

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
    def as_peft(cls, name: str, tensor: Tensor, site: Site) -> Tensor:
        of_patches = name == "lora_magnitude" and site.role == "patch_embedding"
        return tensor.view(1, -1, 1, 1) if of_patches else tensor

    @classmethod
    def from_peft(cls, name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten() if name == "lora_magnitude" else tensor

    @classmethod
    def peft_config(cls, config: LoraConfig) -> dict[str, Any]:
        return {**super().peft_config(config), "use_dora": True}

    @classmethod
    def read_peft_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return of_lora(config) if config.get("use_dora") else None
