"""Encode a batch whose rows have different adapters: `Clip.encode_image(x, adapters=[...])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from clipgraft.engine.encoder import Encoder
from clipgraft.errors import AdapterError
from clipgraft.lora.control import make_active
from clipgraft.lora.state import Adapter, LoraState, lora_state, require_unmerged
from clipgraft.models.clip import Clip
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import Tower

_KEPT = "_clipgraft_rows"
Names: TypeAlias = str | Sequence[str | None]
_Groups = list[tuple[str | None, Tensor]]


def encode_rows(clip: Clip, tower: Tower, inputs: Tensor, names: Names) -> Tensor:
    """(B, …) inputs of a tower -> (B, D) features, each row with its own adapter, without gradients.

    Computes nothing twice and copies no base weight: what the base makes of the rows is computed for all at
    once. A tower that is not the plain transformer of CLIP runs its own forward, adapter by adapter.

    Args:
        clip: the model; adapters may be loaded and unloaded meanwhile.
        tower: `text` or `vision`.
        inputs: token ids or pixels, on the model's device.
        names: one name for all rows, or one a row; None is the base.

    Raises:
        AdapterError: no adapter of that name, not one name a row, or adapters are merged into the base.
    """
    if len(inputs) == 0:
        raise AdapterError("an empty batch has no rows to encode: pass one row at least")
    with rwlock_of(clip.model).read():
        require_unmerged(clip, "choose adapters by row")
        state = lora_state(clip)
        groups = _groups(names, len(inputs))
        adapters = _adapters(state, groups)
        encoder = _encoder(clip)
        if encoder.is_plain(tower) and (tower == "vision" or _pools_early(clip, inputs)):
            parts = [(adapter, rows) for adapter, (_, rows) in zip(adapters, groups, strict=True)]
            with torch.autocast(clip.device.type, enabled=False):
                return encoder.encode_rows(tower, inputs, parts).to(clip.dtype)
    with rwlock_of(clip.model).write():
        return _one_by_one(clip, tower, inputs, groups)


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


def _pools_early(clip: Clip, tokens: Tensor) -> bool:
    return clip.family.text_ends(clip.model, tokens) is not None


class _Kept:
    """Holds a model's encoder; copies and pickles of the model start without one."""

    def __init__(self) -> None:
        self.encoder: Encoder | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _encoder(clip: Clip) -> Encoder:
    """Return a model's encoder; a new one if the model's type or autocast has changed."""
    kept: _Kept = clip.model.__dict__.setdefault(_KEPT, _Kept())
    encoder, autocast = kept.encoder, torch.is_autocast_enabled(clip.device.type)
    if encoder is None or encoder.dtype != (torch.bfloat16 if autocast else clip.dtype):
        encoder = kept.encoder = Encoder(clip, autocast, pack=False)
    return encoder


def _one_by_one(clip: Clip, tower: Tower, inputs: Tensor, groups: _Groups) -> Tensor:
    """Run the model's own forward once for each adapter; the caller holds the model's lock alone."""
    state = lora_state(clip)
    encode = clip.family.encode_text if tower == "text" else clip.family.encode_image
    features: Tensor | None = None
    with _as_it_was(clip, state), torch.no_grad():
        for name, rows in groups:
            if state is not None:
                if name is not None:
                    state.named(name)
                state.enabled = True
                make_active(clip, state, name)
            own = encode(clip.model, inputs[rows.to(inputs.device)])
            if features is None:
                features = own.new_empty(len(inputs), *own.shape[1:])
            features[rows.to(own.device)] = own
    assert features is not None
    return features


@contextmanager
def _as_it_was(clip: Clip, state: LoraState | None) -> Iterator[None]:
    """Restore the model's adapter and mode at the end."""
    if state is None:
        yield
        return
    active, enabled, training = state.active, state.enabled, clip.model.training
    clip.model.eval()
    try:
        yield
    finally:
        clip.model.train(training)
        state.enabled = enabled
        make_active(clip, state, active)
