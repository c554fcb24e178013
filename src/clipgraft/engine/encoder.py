"""`Encoder`: the fast forward of a model's two towers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from clipgraft.engine import towers
from clipgraft.engine.attention import AttentionKernels
from clipgraft.engine.frozen_weights import WeightCache
from clipgraft.engine.mixed_adapters import ActiveAdapter, AdapterShare, MixedAdapters
from clipgraft.engine.packing import Packed, pack
from clipgraft.lora.state import Adapter, lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower


class Encoder:
    """Encodes what `clip.encode_text` and `clip.encode_image` encode, to within rounding (1e-5 in fp32).

    Gradients flow as there, and dropout acts while the model is in training mode. A tower that is not the
    plain transformer of CLIP (`clipgraft.models.architecture`) runs its own forward.

    Attributes:
        clip: the model; its adapters act as they are enabled at each call.
        autocast: whether the compute type is bf16 whatever the type of the weights.
        dtype: the compute type: bf16 for `autocast`, else that of the weights. The residual stream, and
            what is returned, are at least fp32.
    """

    def __init__(
        self,
        clip: Clip,
        autocast: bool = False,
        attention: AttentionKernels | None = None,
        grad_checkpointing: bool = False,
        pack: bool = True,
    ) -> None:
        """`attention` holds kernels that were chosen before; `grad_checkpointing` recomputes blocks.

        Without `pack` no weight is kept in a second layout, for speed, beside the model's own.
        """
        self.clip = clip
        self.dtype = torch.bfloat16 if autocast else clip.dtype
        self.attention = AttentionKernels() if attention is None else attention
        self.autocast = autocast
        self._checkpointing = grad_checkpointing
        self._weights = WeightCache(self.dtype, pack)
        self._norms = clip.family.norms(clip.model)
        self._text = clip.family.text_tower(clip.model)
        self._vision = clip.family.vision_tower(clip.model)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids, on any device -> (B, D) features on the model's, not normalised."""
        packed = self.pack(tokens)
        return self._stock_text(tokens) if packed is None else self.encode_packed(packed)

    def pack(self, tokens: Tensor) -> Packed | None:
        """Pack captions without padding, on the model's device; None where the tower does not allow it."""
        ends = self.clip.family.text_ends(self.clip.model, tokens)
        if self._text is None or ends is None:
            return None
        return pack(tokens.cpu(), ends.cpu()).to(self.clip.device)

    def encode_packed(self, packed: Packed) -> Tensor:
        """Packed captions -> (B, D) features, not normalised."""
        assert self._text is not None
        return towers.run_text(self._text, packed, self._run())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed pixels -> (B, D) features, not normalised."""
        if self._vision is None:
            with self._stock():
                return self._wide(self.clip.encode_image(pixels))
        return towers.run_vision(self._vision, self._moved(pixels), self._run())

    @property
    def vision_blocks(self) -> int:
        """How many blocks of the image tower can run apart from the rest; 0 where it runs its own forward."""
        return 0 if self._vision is None else len(self._vision.blocks)

    @property
    def vision_shape(self) -> tuple[int, int]:
        """(1 + patches, dim) of what goes from one block of the image tower to the next."""
        assert self._vision is not None
        length, dim = self._vision.positions.weight.shape
        return length, dim

    def encode_to_block(self, pixels: Tensor, block: int) -> Tensor:
        """(B, 3, H, W) preprocessed pixels -> (B, 1 + patches, dim) input of a block, at least fp32."""
        assert self._vision is not None
        run = self._run()
        x = towers.embed_patches(self._vision, self._moved(pixels), run)
        return towers.run_to_block(self._vision, x, run, block)

    def encode_from_block(self, x: Tensor, block: int) -> Tensor:
        """(B, 1 + patches, dim) input of a block, of any float type -> (B, D) features, not normalised."""
        assert self._vision is not None
        run = self._run()
        x = self._moved(x).to(run.residual)
        return towers.run_from_patches(self._vision, x, run, block)

    def forget(self, tower: Tower) -> None:
        """Free the prepared weights of a tower that will not be needed soon."""
        self._weights.forget(tower)

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the model's device; a copy to a GPU is queued, not waited for."""
        to_gpu = self.clip.device.type == "cuda" and tensor.device.type == "cpu"
        return (tensor.pin_memory() if to_gpu else tensor).to(self.clip.device, non_blocking=True)

    def _stock_text(self, tokens: Tensor) -> Tensor:
        with self._stock():
            return self._wide(self.clip.encode_text(tokens))

    @staticmethod
    def _wide(features: Tensor) -> Tensor:
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _stock(self) -> torch.autocast:
        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast)

    def _run(self) -> towers.TowerPass:
        state = lora_state(self.clip)
        adapter = ActiveAdapter.of(None if state is None else state.in_effect, self._norms)
        kernel = self.attention.kernel(trains=self.clip.model.training)
        return towers.TowerPass(self._weights, adapter, kernel, self._checkpointing)

    def encode_rows(
        self, tower: Tower, inputs: Tensor, groups: Sequence[tuple[Adapter | None, Tensor]]
    ) -> Tensor:
        """Encode rows of several adapters in one batch, without gradients and dropout.

        Args:
            tower: `text` or `vision`; it must be a plain one (`is_plain`).
            inputs: (B, L) token ids or (B, 3, H, W) pixels.
            groups: each adapter, None for the base, with the numbers of its rows; together all rows, once.

        Returns:
            (B, D) features, not normalised.
        """
        order = torch.cat([rows for _, rows in groups])
        adapters = [ActiveAdapter.of(adapter, self._norms) for adapter, _ in groups]
        counts = [len(rows) for _, rows in groups]
        with torch.no_grad():
            ordered = inputs[order.to(inputs.device)]
            features = (self._mixed_text if tower == "text" else self._mixed_images)(
                ordered, adapters, counts
            )
            return torch.empty_like(features).index_copy_(0, order.to(features.device), features)

    def is_plain(self, tower: Tower) -> bool:
        """Whether a tower is computed by the engine, not by its own forward."""
        return (self._text if tower == "text" else self._vision) is not None

    def _mixed_text(self, tokens: Tensor, adapters: list[ActiveAdapter], counts: list[int]) -> Tensor:
        ends = self.clip.family.text_ends(self.clip.model, tokens)
        assert self._text is not None
        assert ends is not None
        kinds = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        packed = pack(tokens.cpu(), ends.cpu(), kinds).to(self.clip.device)
        shares = [AdapterShare(*parts) for parts in zip(adapters, *packed.shares, strict=True)]
        return towers.run_text(self._text, packed, self._mixed_run(shares))

    def _mixed_images(self, pixels: Tensor, adapters: list[ActiveAdapter], counts: list[int]) -> Tensor:
        assert self._vision is not None
        stops = list(itertools.accumulate(counts))
        rows = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        shares = [AdapterShare(adapter, own, own) for adapter, own in zip(adapters, rows, strict=True)]
        return towers.run_vision(self._vision, self._moved(pixels), self._mixed_run(shares))

    def _mixed_run(self, shares: list[AdapterShare]) -> towers.TowerPass:
        kernel = self.attention.kernel(trains=False)
        return towers.TowerPass(self._weights, ActiveAdapter(), kernel, mix=MixedAdapters(tuple(shares)))
