"""Read and build adapters for one base, many of one shape quickly, without attaching them."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.attach import check_base, detached, reading_options
from clipgraft.adapters.convert import read_any
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import Adapter
from clipgraft.lora.variants import PlainLora
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Site

_MOST = 8


class AdapterBuilder:
    """Reads adapters of any format and builds them for a base, as `detached` does; any thread may call it.

    Adapters that are served by the hundreds mostly differ in their numbers alone. What is the same for all of
    one configuration and shape (which sites there are, whether they fit the base) is found out for the first
    of them, and kept without its numbers.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._lock = threading.Lock()
        self._skeletons: deque[_Skeleton] = deque(maxlen=_MOST)

    @cached_property
    def _options(self) -> dict[str, Any]:
        return reading_options(self.clip)

    def read(self, path: str | Path) -> tuple[Adapter, AdapterFile]:
        """Read an adapter and build it for the base.

        Raises:
            AdapterError: as `load_adapter`.
        """
        file = read_any(path, **self._options)
        known = self._fitting(file)
        if known is not None:
            check_base(self.clip, file, force=False)
            return known.filled(file, self.clip.device), file
        adapter = detached(self.clip, file)
        if _is_simple(file):
            with self._lock:
                self._skeletons.appendleft(_Skeleton.of(file, adapter))
        return adapter, file

    def _fitting(self, file: AdapterFile) -> _Skeleton | None:
        if not _is_simple(file):
            return None
        with self._lock:
            known = tuple(self._skeletons)
        return next((skeleton for skeleton in known if skeleton.fits(file)), None)


def _is_simple(file: AdapterFile) -> bool:
    """Whether A and B of plain LoRA are all there is to an adapter."""
    more = file.shared or file.biases or file.temperature or file.needs_base
    return file.settings.variant == PlainLora.variant and file.settings.bias == "none" and not more


_Shapes = Mapping[Site, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class _Skeleton:
    """An adapter without its numbers.

    Attributes:
        adapter: its weights are on the meta device.
        config: `adapter_config.json`.
        shapes: of the stored tensors.
    """

    adapter: Adapter
    config: Mapping[str, Any]
    shapes: _Shapes

    @classmethod
    def of(cls, file: AdapterFile, adapter: Adapter) -> _Skeleton:
        layers = {
            site: _twin(layer, {name: p.to("meta") for name, p in layer.named_parameters()})
            for site, layer in adapter.layers.items()
        }
        bare = Adapter(adapter.settings, layers)
        return cls(bare, file.config, _shapes(file))

    def fits(self, file: AdapterFile) -> bool:
        """Whether a file differs from the one it was made of in numbers alone."""
        same = file.settings == self.adapter.settings and file.config == self.config
        return same and _shapes(file) == self.shapes

    def filled(self, file: AdapterFile, device: torch.device) -> Adapter:
        """A new adapter with the weights of a file that fits."""
        layers = {
            site: _twin(layer, {n: t.to(device, torch.float32) for n, t in file.parts[site].items()})
            for site, layer in self.adapter.layers.items()
        }
        return replace(self.adapter, layers=layers, origin=str(file.path.resolve()))


def _shapes(file: AdapterFile) -> _Shapes:
    return {site: {name: tuple(t.shape) for name, t in parts.items()} for site, parts in file.parts.items()}


def _twin(layer: LoraLayer, tensors: Mapping[str, torch.Tensor]) -> LoraLayer:
    """The layer with other tensors for its Parameters."""
    twin = copy.copy(layer)
    twin._parameters = {
        name: nn.Parameter(tensors[name].detach(), requires_grad=False) if name in tensors else parameter
        for name, parameter in layer._parameters.items()
    }
    return twin
