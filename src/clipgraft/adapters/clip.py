"""`Clip` as users hold it, with adapters by row and the guide's methods, and the guide's function names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, lora_state_dict, save_adapter
from clipgraft.adapters.attach import load_adapter
from clipgraft.engine.encoder import Names, encode_rows
from clipgraft.lora.control import disable_lora, enable_lora, merge_lora, unmerge_lora
from clipgraft.lora.inject import apply_lora
from clipgraft.lora.state import count_parameters, require_lora, verify_gradients
from clipgraft.lora.targets import guide_targets
from clipgraft.models.clip import Clip as BaseClip
from clipgraft.models.clip import ClipLike, Images, unit_norm


def apply_lora_to_text_encoder(
    model: ClipLike,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
) -> int:
    """`apply_lora` on the text tower by the guide's module names; returns how many blocks carry LoRA."""
    targets = guide_targets(("in_proj", "out_proj") if target_modules is None else target_modules)
    apply_lora(model, r=r, alpha=lora_alpha, dropout=lora_dropout, targets=targets)
    return len({site.block for site in require_lora(model).layers})


def get_lora_state_dict(model: ClipLike) -> dict[str, Tensor]:
    """`lora_state_dict`."""
    return lora_state_dict(model)


def save_lora_adapters(model: ClipLike, path: str | Path) -> Path:
    """`save_adapter`."""
    return save_adapter(model, path)


def load_lora_adapters(model: ClipLike, path: str | Path) -> AdapterFile:
    """`load_adapter`."""
    return load_adapter(model, path)


class Clip(BaseClip):
    """A CLIP model that carries adapters: what `clipgraft.load` returns.

    To `models.clip.Clip` it adds batches whose rows run with different adapters, and the guide's names of
    functions as methods. Both stand above `models`, which knows nothing of adapters.
    """

    @classmethod
    def over(cls, base: BaseClip) -> Clip:
        """The same model as one that carries adapters."""
        return cls(**vars(base))

    apply_lora_to_text_encoder = apply_lora_to_text_encoder
    enable_lora = enable_lora
    disable_lora = disable_lora
    merge_lora = merge_lora
    unmerge_lora = unmerge_lora
    count_parameters = count_parameters
    verify_gradients = verify_gradients
    get_lora_state_dict = get_lora_state_dict
    save_lora_adapters = save_lora_adapters
    load_lora_adapters = load_lora_adapters

    def encode_image(self, images: Images, normalize: bool = False, adapters: Names | None = None) -> Tensor:
        """Pictures, paths, or (N, 3, H, W) preprocessed pixels -> (N, D) features, unit-norm if `normalize`.

        Args:
            images: as in `models.clip.Clip.encode_image`.
            normalize: divide by the norm.
            adapters: which adapter each row runs with: N names of loaded ones, None for the base; or one name
                for all. Without gradients then. By default the active adapter runs.

        Raises:
            AdapterError: no adapter of that name, or not one name a row.
            DataError: a file is no image that can be read.
        """
        if adapters is None:
            return super().encode_image(images, normalize)
        pixels = self.pixels(images).to(self.device, self.dtype)
        features = encode_rows(self, "vision", pixels, adapters)
        return unit_norm(features) if normalize else features

    def encode_text(
        self,
        texts: Tensor | str | Sequence[str],
        normalize: bool = False,
        adapters: Names | None = None,
    ) -> Tensor:
        """Strings or (N, L) token ids -> (N, D) features; arguments and errors as in `encode_image`."""
        if adapters is None:
            return super().encode_text(texts, normalize)
        features = encode_rows(self, "text", self.tokens(texts), adapters)
        return unit_norm(features) if normalize else features
