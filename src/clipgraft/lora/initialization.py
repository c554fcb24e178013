"""Initialize A and B: on the base's principal directions, or on those of the data.

By default an update starts at zero in random directions (`LoraLayer.make_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import AdapterError
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter, require_lora, require_unmerged
from clipgraft.lora.variants import PlainLora, variant_of
from clipgraft.models.clip import ClipLike, as_clip


def initialize_from_base(layer: LoraLayer, weight: Tensor) -> None:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): s·B·A starts as the best rank-r part of the base's W.

    There the base is replaced by what is left of it. Here the base stays as it is, and a frozen copy of the
    start is subtracted beside it: W' = W + s·(B·A - B₀·A₀), which is the same, an update of rank 2r, and all
    that a file needs.
    """
    assert isinstance(layer, PlainLora)
    matrix = layer.matrix(weight.detach()).float()
    r = min(layer.r, *matrix.shape)
    u, s, v = principal(matrix, r)
    root = (s / layer.scaling).sqrt()
    with torch.no_grad():
        for parameter, start in ((layer.lora_A, root[:, None] * v), (layer.lora_B, u * root)):
            parameter.zero_()
            flat = parameter.flatten(1)
            flat[: start.shape[0], : start.shape[1]] = start
    layer.lora_start_A = layer.lora_A.detach().clone()
    layer.lora_start_B = layer.lora_B.detach().clone()


def principal(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of an (m, n) matrix: (m, r), (r,), (r, n), largest first.

    Out of the eigenvectors of the smaller Gram matrix in float64: a vocabulary has many rows and few columns.
    """
    wide = matrix.double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    s, v = values.flip(0)[:r].clamp_min(0).sqrt(), vectors.flip(1)[:, :r]
    u = (tall @ v) / s.clamp_min(torch.finfo(torch.float64).tiny)
    left, right = (u, v.T) if tall is wide else (v, u.T)
    return left.to(matrix.dtype), s.to(matrix.dtype), right.to(matrix.dtype)


def start_from_data(model: ClipLike, run: Callable[[], object]) -> int:
    """EVA-style start (Paischer et al. 2024, arXiv:2410.07170): A points where the data does.

    `run` encodes a few batches with the model, by its own forward; of what comes in at each site of the
    active adapter, the r directions with the most energy become the rows of A. B stays zero, so that nothing
    is changed. Ranks stay as they are; embeddings, which read ids, start as before.

    Returns:
        How many sites were started so.

    Raises:
        AdapterError: the model carries no adapter, one that has been trained, or `run` reaches none of it.
    """
    clip = as_clip(model)
    require_unmerged(clip, "start an adapter from data")
    adapter = require_lora(clip).chosen()
    kind = variant_of(adapter.settings)
    if "eva" not in kind.initializations:
        raise AdapterError(f"start_from_data sets A, which {kind.label} does not train")
    layers = _readers(adapter)
    if not is_new(adapter):
        raise AdapterError("this adapter has been trained already: start_from_data is for new ones")
    moments: dict[LoraLayer, Tensor] = {}
    training = clip.model.training
    # Fused attention calls its updates in training mode alone.
    with _listening(layers, moments), torch.no_grad():
        clip.model.train()
        try:
            run()
        finally:
            clip.model.train(training)
    if not moments:
        raise AdapterError("start_from_data: no batch went through the adapted tower; encode its own inputs")
    for layer, moment in moments.items():
        assert isinstance(layer, PlainLora)
        directions = torch.linalg.eigh(moment).eigenvectors.flip(1).T[: layer.r]
        with torch.no_grad():
            layer.lora_A.zero_().flatten(1)[: len(directions)] = directions.to(layer.lora_A.dtype)
    return len(moments)


def is_new(adapter: Adapter) -> bool:
    """Whether an adapter's B are still zero, embeddings aside."""
    return not any(bool(layer.starts_at_zero.any()) for layer in _readers(adapter))


def changes_nothing(adapter: Adapter) -> bool:
    """Whether the updates of an adapter are still zero, whichever way it was initialized."""
    return all(layer.adds_nothing for layer in adapter.layers.values() if layer.r)


def _readers(adapter: Adapter) -> list[LoraLayer]:
    """Return the updates whose inputs are vectors, not ids."""
    kinds = ("linear", "rows", "fused", "read", "conv", "projection")
    return [layer for layer in adapter.layers.values() if layer.r and layer.kind in kinds]


@contextmanager
def _listening(layers: list[LoraLayer], moments: dict[LoraLayer, Tensor]) -> Iterator[None]:
    """Sum XᵀX over the inputs of each update."""

    def listen(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, LoraLayer)
        x = _rows(layer, *args)
        moments[layer] = moments.get(layer, torch.zeros((), dtype=torch.float64)) + (x.T @ x).double().cpu()

    handles = [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: LoraLayer, x: Tensor, host: nn.Module | None = None) -> Tensor:
    """Return an update's inputs as (N, in); those of a convolution are its patches."""
    if isinstance(host, nn.Conv2d):
        assert isinstance(host.padding, tuple)
        if host.groups > 1:
            x = x.reshape(len(x) * host.groups, -1, *x.shape[2:])  # what each group reads
        unfold = nn.functional.unfold(x.float(), host.kernel_size, host.dilation, host.padding, host.stride)
        return unfold.transpose(1, 2).flatten(0, 1)
    return x.float().reshape(-1, x.shape[-1])
