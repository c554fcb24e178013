"""`Encoder`: the fast forward of a model's two towers, with one adapter or with one for each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from clipgraft.engine import towers
from clipgraft.engine.attention import AttentionKernels
from clipgraft.engine.linear import WeightCache
from clipgraft.engine.mixed_adapters import ActiveAdapter, AdapterShare, MixedAdapters, prepare
from clipgraft.engine.packing import Packed, by_mkl, pack
from clipgraft.engine.quantized import require_int8
from clipgraft.errors import AdapterError
from clipgraft.lora.control import make_active
from clipgraft.lora.inject import hung
from clipgraft.lora.state import Adapter, LoraState, lora_state, require_lora, require_unmerged
from clipgraft.models.architecture import Part
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.models.mapped_weights import check_unchanged, copy_from_files
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import Tower
from clipgraft.process_memory import drop_mapped, trim_heap

_KEPT = "_clipgraft_rows"
Names: TypeAlias = str | Sequence[str | None]
_Groups = list[tuple[str | None, Tensor]]


class Encoder:
    """Encodes what `clip.encode_text` and `clip.encode_image` encode, to within rounding (1e-5 in fp32).

    Gradients flow as there, and dropout acts while the model is in training mode. A tower that is not the
    plain transformer of CLIP (`clipgraft.models.architecture`) runs its own forward.

    Attributes:
        clip: the model; its adapters act as they are enabled at each call.
        autocast: whether the compute type is bf16 whatever the type of the weights.
        int8: whether products of blocks are computed in 8-bit integers.
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
        int8: bool = False,
    ) -> None:
        """`attention` holds kernels that were chosen before; `grad_checkpointing` recomputes blocks.

        Without `pack` no weight is kept in a second layout, for speed, beside the model's own. With `int8`
        the products of blocks are computed in 8-bit integers, and all else in bf16: not to 1e-5, but to
        what `clipgraft.evaluate.recall_lost` measures, and without gradients.

        Raises:
            ModelError: this device, or this CPU, does not compute in int8.
        """
        if int8:
            require_int8(clip.device)
        autocast = autocast or int8
        self.clip = clip
        self.int8 = int8
        self.dtype = torch.bfloat16 if autocast else clip.dtype
        self.attention = AttentionKernels() if attention is None else attention
        self.autocast = autocast
        self._checkpointing = grad_checkpointing
        self._weights = WeightCache(self.dtype, pack, int8)
        self._norms = clip.family.norms(clip.model)
        self._text = clip.family.text_tower(clip.model)
        self._vision = clip.family.vision_tower(clip.model)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids, on any device -> (B, D) features on the model's, not normalised."""
        packed = self.pack(tokens)
        if self._text is not None and packed is not None:
            return towers.run_text(self._text, packed, self._run())
        if self._text is not None and not self._text.causal:
            return towers.run_whole_text(self._text, self._moved(tokens), self._run())
        with self._stock():
            return self._wide(self.clip.encode_text(tokens))

    def pack(self, tokens: Tensor) -> Packed | None:
        """Pack captions without padding, on the model's device; None where the tower does not allow it."""
        ends = self.clip.family.text_ends(self.clip.model, tokens)
        if self._text is None or ends is None or not self._text.causal:
            return None
        return pack(tokens.cpu(), ends.cpu(), compiled=self._compiled).to(self.clip.device)

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
        """(tokens, dim) of what goes from one block of the image tower to the next."""
        assert self._vision is not None
        length, dim = self._vision.positions.matrix.shape
        return length, dim

    def encode_to_block(self, pixels: Tensor, block: int) -> Tensor:
        """(B, 3, H, W) preprocessed pixels -> (B, tokens, dim) input of a block, at least fp32."""
        assert self._vision is not None
        run = self._run()
        x = towers.embed_patches(self._vision, self._moved(pixels), run)
        return towers.run_to_block(self._vision, x, run, block)

    def encode_from_block(self, x: Tensor, block: int) -> Tensor:
        """(B, tokens, dim) input of a block, of any float type -> (B, D) features, not normalised."""
        assert self._vision is not None
        run = self._run()
        x = self._moved(x).to(run.residual)
        return towers.run_from_patches(self._vision, x, run, block)

    @property
    def vision_projection(self) -> Part | None:
        """The last linear map of the image tower; None where it has none, or runs its own forward."""
        if self._vision is None or self._vision.proj is None:
            return None
        (part,) = self._vision.proj
        return part

    def encode_to_projection(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed pixels -> (B, dim) input of `vision_projection`, at least fp32."""
        assert self._vision is not None
        return towers.run_vision(replace(self._vision, proj=None), self._moved(pixels), self._run())

    def forget(self, tower: Tower) -> None:
        """Free the prepared weights of a tower that is not needed soon, and the pages of mapped ones."""
        self._weights.forget(tower)
        drop_mapped(
            weight for group in self.clip.family.tower_groups(self.clip.model, tower) for weight in group
        )
        trim_heap()

    def _moved(self, tensor: Tensor) -> Tensor:
        return queued(tensor, self.clip.device)

    @staticmethod
    def _wide(features: Tensor) -> Tensor:
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _stock(self) -> torch.autocast:
        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.autocast)

    def _run(self) -> towers.TowerPass:
        check_unchanged(self.clip.model)
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
        # Shares of about as many nodes side by side: what they add to is one slice then.
        groups = sorted(groups, key=lambda group: (group[0] is not None, len(group[1])))
        order = torch.cat([rows for _, rows in groups])
        adapters = [ActiveAdapter.of(adapter, self._norms) for adapter, _ in groups]
        counts = [len(rows) for _, rows in groups]
        with torch.no_grad():
            ordered = inputs[queued(order, inputs.device)]
            features = (self._mixed_text if tower == "text" else self._mixed_images)(
                ordered, adapters, counts
            )
            return torch.empty_like(features).index_copy_(0, self._moved(order), features)

    def prepare(self, adapter: Adapter) -> None:
        """Compute ahead what an adapter that will not change any more makes of each linear map."""
        linears = [
            *(() if self._text is None else towers.linears(self._text)),
            *(() if self._vision is None else towers.linears(self._vision)),
        ]
        prepare(adapter, linears, self.dtype)

    def takes(self, tokens: Tensor) -> bool:
        """Whether (B, L) token ids are computed by the engine: where it is known which of them is pooled."""
        if self._text is None:
            return False
        return not self._text.causal or self.clip.family.text_ends(self.clip.model, tokens) is not None

    def is_plain(self, tower: Tower) -> bool:
        """Whether a tower is computed by the engine, not by its own forward."""
        return (self._text if tower == "text" else self._vision) is not None

    def _mixed_text(self, tokens: Tensor, adapters: list[ActiveAdapter], counts: list[int]) -> Tensor:
        assert self._text is not None
        if not self._text.causal:
            run = self._mixed_run(_shares_of_rows(adapters, counts))
            return towers.run_whole_text(self._text, self._moved(tokens), run)
        ends = self.clip.family.text_ends(self.clip.model, tokens)
        assert ends is not None
        kinds = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        packed = pack(tokens.cpu(), ends.cpu(), kinds, self._compiled).to(self.clip.device)
        shares = [AdapterShare(*parts) for parts in zip(adapters, *packed.shares, strict=True)]
        return towers.run_text(self._text, packed, self._mixed_run(shares))

    def _mixed_images(self, pixels: Tensor, adapters: list[ActiveAdapter], counts: list[int]) -> Tensor:
        assert self._vision is not None
        run = self._mixed_run(_shares_of_rows(adapters, counts))
        return towers.run_vision(self._vision, self._moved(pixels), run)

    @property
    def _compiled(self) -> bool:
        """Whether products of a new shape are compiled first."""
        return not by_mkl(self.dtype, self.clip.device)

    def _mixed_run(self, shares: list[AdapterShare]) -> towers.TowerPass:
        check_unchanged(self.clip.model)
        kernel = self.attention.kernel(trains=False)
        return towers.TowerPass(self._weights, ActiveAdapter(), kernel, mix=MixedAdapters(tuple(shares)))


def _shares_of_rows(adapters: list[ActiveAdapter], counts: list[int]) -> list[AdapterShare]:
    """The rows of each adapter, which are neighbours."""
    stops = list(itertools.accumulate(counts))
    rows = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    return [AdapterShare(adapter, own, own) for adapter, own in zip(adapters, rows, strict=True)]


def encode_rows(clip: Clip, tower: Tower, inputs: Tensor, names: Names) -> Tensor:
    """(B, …) inputs of a tower -> (B, D) features, each row with its own adapter, without gradients.

    Computes nothing twice and copies no base weight: what the base makes of the rows is computed for all at
    once. A tower that is not the plain transformer of CLIP runs its own forward, adapter by adapter.

    Args:
        clip: the model; adapters may be loaded and unloaded meanwhile.
        tower: `text` or `vision`.
        inputs: token ids or pixels, on any device.
        names: one name for all rows, or one a row; None is the base.

    Raises:
        AdapterError: no adapter of that name, not one name a row, or adapters are merged into the base.
    """
    if len(inputs) == 0:
        raise AdapterError("an empty batch has no rows to encode: pass one row at least")
    with rwlock_of(clip.model).read():
        require_unmerged(clip, "choose adapters by row")
        groups = _groups(names, len(inputs))
        adapters = _adapters(lora_state(clip), groups)
    return encode_mixed(
        clip, tower, inputs, [(own, rows) for own, (_, rows) in zip(adapters, groups, strict=True)]
    )


def encode_mixed(
    clip: Clip, tower: Tower, inputs: Tensor, groups: Sequence[tuple[Adapter | None, Tensor]]
) -> Tensor:
    """`encode_rows` with the adapters themselves, which need not be attached to the model.

    Where a tower runs its own forward, those that are not are hung on for the call; it runs alone then.

    Args:
        clip: the model; adapters may be loaded and unloaded meanwhile.
        tower: `text` or `vision`.
        inputs: (B, L) token ids or (B, 3, H, W) pixels, on any device; from the CPU they are moved as late as
            can be.
        groups: each adapter, None for the base, with the numbers of its rows; together all rows, once.

    Returns:
        (B, D) features of the base's type, not normalised.

    Raises:
        AdapterError: adapters are merged into the base.
    """
    with rwlock_of(clip.model).read():
        require_unmerged(clip, "choose adapters by row")
        encoder = _encoder(clip)
        if encoder.is_plain(tower) and (tower == "vision" or encoder.takes(inputs)):
            with torch.autocast(clip.device.type, enabled=False):
                return encoder.encode_rows(tower, inputs, groups).to(clip.dtype)
    with rwlock_of(clip.model).write():
        require_unmerged(clip, "choose adapters by row")
        return _one_by_one(clip, tower, inputs, groups)


def keep_packed(clip: Clip) -> None:
    """Let `encode_mixed` keep weights in a second, faster layout: for models that do nothing else."""
    with rwlock_of(clip.model).write():
        copy_from_files(clip.model)  # it serves for weeks, whatever becomes of the file
        kept = _kept(clip)
        kept.pack, kept.encoder = True, None


def prepare_adapter(clip: Clip, adapter: Adapter) -> None:
    """Compute ahead what `encode_mixed` needs of an adapter that will not change any more."""
    with rwlock_of(clip.model).read():
        _encoder(clip).prepare(adapter)


def _groups(names: Names, count: int) -> _Groups:
    """Each name with the numbers of its rows."""
    listed: Sequence[str | None] = [names] * count if isinstance(names, str) else list(names)
    if len(listed) != count:
        raise AdapterError(
            f"adapters=... has {len(listed)} names for {count} rows: give one a row, or one for all"
        )
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(listed):
        rows.setdefault(name, []).append(row)
    return [(name, torch.tensor(numbers)) for name, numbers in rows.items()]


def _adapters(state: LoraState | None, groups: _Groups) -> list[Adapter | None]:
    """Look up adapters by name; one that is unloaded meanwhile stays usable for this batch."""
    if state is None:
        named = [name for name, _ in groups if name is not None]
        if named:
            raise AdapterError(f"no adapter {named[0]!r} on this model: load it with load_adapter first")
        return [None] * len(groups)
    return [None if name is None else state.named(name) for name, _ in groups]


class _Kept:
    """Holds a model's encoder; copies and pickles of the model start without one."""

    def __init__(self) -> None:
        self.encoder: Encoder | None = None
        self.pack = False

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _encoder(clip: Clip) -> Encoder:
    """Return a model's encoder; a new one if the model's type or autocast has changed."""
    kept = _kept(clip)
    encoder, autocast = kept.encoder, torch.is_autocast_enabled(clip.device.type)
    if encoder is None or encoder.dtype != (torch.bfloat16 if autocast else clip.dtype):
        encoder = kept.encoder = Encoder(clip, autocast, pack=kept.pack)
    return encoder


def _kept(clip: Clip) -> _Kept:
    kept: _Kept = clip.model.__dict__.setdefault(_KEPT, _Kept())
    return kept


def _one_by_one(
    clip: Clip, tower: Tower, inputs: Tensor, groups: Sequence[tuple[Adapter | None, Tensor]]
) -> Tensor:
    """Run the model's own forward once for each adapter; the caller holds the model's lock alone."""
    encode = clip.family.encode_text if tower == "text" else clip.family.encode_image
    inputs = queued(inputs, clip.device)
    touching = [(None if a is None or not a.touches(tower) else a, rows) for a, rows in groups]
    features: Tensor | None = None
    with _as_it_was(clip), torch.no_grad(), hung(clip, [a for a, _ in touching if a is not None]) as names:
        state, next_name = require_lora(clip), iter(names)
        for adapter, rows in touching:
            state.enabled = True
            make_active(clip, state, None if adapter is None else next(next_name))
            own = encode(clip.model, inputs[queued(rows, inputs.device)])
            if features is None:
                features = own.new_empty(len(inputs), *own.shape[1:])
            features[queued(rows, own.device)] = own
    assert features is not None
    return features


@contextmanager
def _as_it_was(clip: Clip) -> Iterator[None]:
    """Restore the model's adapter and mode at the end."""
    state, training = lora_state(clip), clip.model.training
    active, enabled = (None, True) if state is None else (state.active, state.enabled)
    clip.model.eval()
    try:
        yield
    finally:
        clip.model.train(training)
        if state is not None:
            state.enabled = enabled
            make_active(clip, state, active)
